// The products of bfloat16 rows with activations rounded to bfloat16, by the instruction for that.
//
// One output is a chain of dot products of two in float32 over the columns in ascending order: the
// same for a token in any batch and on any thread.
#include "kernels.h"
#include "output.h"
#include "vec_avx512.h"

namespace cortexd {
namespace {

using Bf16 = Dense<Type::BF16>;

// As for the other dense weights; see dense_kernel.h.
constexpr int64_t kAheadBytes = 8192;
// The tokens of one pass over some groups: their numbers and the groups stay in the caches.
constexpr int64_t kTokensOfPass = 128;

__m512bh as_pairs(__m512i words) { return reinterpret_cast<__m512bh>(words); }

// 16 rows of `Groups` groups x `Tokens` tokens.
template <int Groups, int Tokens>
void tile(const uint8_t* group, int64_t columns, const uint16_t* x,
          __m512 (&sums)[Groups][Tokens]) {
    const int64_t group_bytes = Bf16::group_bytes(columns);
    for (int g = 0; g < Groups; ++g) {
        for (int m = 0; m < Tokens; ++m) sums[g][m] = _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < columns; k += 2, group += Bf16::kPairBytes) {
        __m512bh weights[Groups];
        for (int g = 0; g < Groups; ++g) {
            const uint8_t* pair = group + g * group_bytes;
            __builtin_prefetch(pair + kAheadBytes, 0, 2);
            weights[g] = as_pairs(_mm512_loadu_si512(pair));
        }
        for (int m = 0; m < Tokens; ++m) {
            int32_t pair;
            std::memcpy(&pair, x + m * columns + k, sizeof(pair));
            const __m512bh both = as_pairs(_mm512_set1_epi32(pair));
            for (int g = 0; g < Groups; ++g) {
                sums[g][m] = _mm512_dpbf16_ps(sums[g][m], weights[g], both);
            }
        }
    }
}

// Tokens in tiles of at most `Tokens`, the rest in tiles of half that size.
template <int Groups, int Tokens>
void tiles(const Matrix& matrix, int64_t g, const uint16_t* x, int64_t first, int64_t last,
           const Destination& to) {
    const uint8_t* group = matrix.packed + g * Bf16::group_bytes(matrix.columns);
    for (; first + Tokens <= last; first += Tokens) {
        prefetch_outputs(to, g, Groups, first, Tokens);
        __m512 sums[Groups][Tokens];
        tile(group, matrix.columns, x + first * matrix.columns, sums);
        for (int i = 0; i < Groups; ++i) {
            const Output out(matrix, g + i, to);
            for (int m = 0; m < Tokens; ++m) out.store<Avx512>(sums[i][m], first + m);
        }
    }
    if constexpr (Tokens > 1) tiles<Groups, Tokens / 2>(matrix, g, x, first, last, to);
}

void multiply_rounded_groups(const Matrix& matrix, const uint16_t* x, int64_t num_tokens,
                             int64_t begin, int64_t end, float* y, int64_t y_stride,
                             bool accumulate) {
    const Destination to{y, y_stride, accumulate};
    for (int64_t first = 0; first < num_tokens; first += kTokensOfPass) {
        const int64_t left = num_tokens - first;
        const int64_t last = left < kTokensOfPass ? num_tokens : first + kTokensOfPass;
        int64_t g = begin;
        for (; g + 2 <= end; g += 2) tiles<2, 8>(matrix, g, x, first, last, to);
        if (g < end) tiles<1, 8>(matrix, g, x, first, last, to);
    }
}

void round_row(const float* x, int64_t columns, uint16_t* rounded) {
    for (int64_t i = 0; i < columns; i += kRows) {
        const __m256bh halves = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + i));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(rounded + i),
                            reinterpret_cast<__m256i>(halves));
    }
}

}  // namespace

Kernels with_bf16(const Kernels& base) {
    Kernels set = base;
    set.name = "avx512bf16";
    set.round_row = round_row;
    set.multiply_rounded_groups = multiply_rounded_groups;
    return set;
}

}  // namespace cortexd
