// The products of dense rows (bfloat16, float16, float32) with float32 activations.
//
// One output is acc = fma(weight, x, acc) in float32 over the columns in ascending order: the same
// for a token in any batch and on any thread. Weights are widened exactly.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "output.h"

namespace cortexd {
namespace {

// As for quantised weights; see linear_kernel.h.
constexpr int64_t kDensePrefetchBytes = 8192;

// 16 rows of `Groups` groups x `Tokens` tokens. One sum is a chain of additions that wait for each
// other, so several groups go side by side even for one token.
template <class Isa, class D, int Groups, int Tokens>
void multiply_dense_tile(const uint8_t* group, int64_t columns, const float* const* rows,
                         typename Isa::F (&sums)[Groups][Tokens]) {
    using F = typename Isa::F;
    const int64_t group_bytes = D::group_bytes(columns);
    for (int g = 0; g < Groups; ++g) {
        for (int m = 0; m < Tokens; ++m) sums[g][m] = Isa::zero();
    }
    for (int64_t k = 0; k < columns; k += 2, group += D::kPairBytes) {
        F first[Groups], second[Groups];
        for (int g = 0; g < Groups; ++g) {
            const uint8_t* pair = group + g * group_bytes;
            for (int64_t line = 0; line < D::kPairBytes; line += 64) {
                __builtin_prefetch(pair + kDensePrefetchBytes + line, 0, 2);
            }
            if constexpr (D::kType == Type::BF16) {
                Isa::load_bf16_pair(pair, first[g], second[g]);
            } else if constexpr (D::kType == Type::F16) {
                first[g] = Isa::load_half(pair);
                second[g] = Isa::load_half(pair + 32);
            } else {
                first[g] = Isa::load(reinterpret_cast<const float*>(pair));
                second[g] = Isa::load(reinterpret_cast<const float*>(pair) + kRows);
            }
        }
        for (int m = 0; m < Tokens; ++m) {
            const F x = Isa::set1(rows[m][k]), next = Isa::set1(rows[m][k + 1]);
            for (int g = 0; g < Groups; ++g) {
                sums[g][m] = Isa::fma(first[g], x, sums[g][m]);
                sums[g][m] = Isa::fma(second[g], next, sums[g][m]);
            }
        }
    }
}

// Tokens in tiles of at most `Tokens`, the rest in tiles of half that size.
template <class Isa, class D, int Groups, int Tokens>
void multiply_dense_groups(const Matrix& matrix, int64_t g, const float* const* rows,
                           int64_t first, int64_t num_tokens, const Destination& to) {
    const uint8_t* group = matrix.packed + g * D::group_bytes(matrix.columns);
    for (; first + Tokens <= num_tokens; first += Tokens) {
        typename Isa::F sums[Groups][Tokens];
        multiply_dense_tile<Isa, D>(group, matrix.columns, rows + first, sums);
        for (int i = 0; i < Groups; ++i) {
            const Output out(matrix, g + i, to);
            for (int m = 0; m < Tokens; ++m) out.template store<Isa>(sums[i][m], first + m);
        }
    }
    if constexpr (Tokens > 1) {
        multiply_dense_groups<Isa, D, Groups, Tokens / 2>(matrix, g, rows, first, num_tokens, to);
    }
}

template <class Isa, class D>
void multiply_dense(const Matrix& matrix, const Activation& x, int64_t num_tokens, int64_t begin,
                    int64_t end, const Destination& to) {
    constexpr int kGroups = Isa::kDenseGroups, kTokens = Isa::kDenseTokens;
    int64_t g = begin;
    for (; g + kGroups <= end; g += kGroups) {
        multiply_dense_groups<Isa, D, kGroups, kTokens>(matrix, g, x.rows, 0, num_tokens, to);
    }
    for (; g < end; ++g) {
        multiply_dense_groups<Isa, D, 1, kTokens>(matrix, g, x.rows, 0, num_tokens, to);
    }
}

}  // namespace
}  // namespace cortexd
