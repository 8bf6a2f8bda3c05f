// The dot products of packed rows with quantised activations, for any instruction set.
//
// One output is, over the 32-blocks in ascending order, acc = acc + term in float32, where
//   term = (scale * x.scale) * float(integer dot product) [+ minimum * x.scaled_sum]
// or, where the halves of a block have scales of their own,
//   term = (scale * float(dot product) + second scale * float(second dot product)) * x.scale
// with an exact integer (at most 255 * 32512 * 32 < 2^31) and no fused multiply-add: the result
// does not depend on the instruction set, on how many tokens share a pass, or on the thread. Tests
// hold it equal, bit by bit, to reference.py.
#pragma once

#include <cstdint>
#include <limits>

#include "dense_kernel.h"
#include "kernels.h"
#include "output.h"

namespace cortexd {
namespace {

// 8 KiB ahead, to the second-level cache. Measured with huge pages: on a Zen 4, 8 KiB gave 70-80 % of
// a plain read, 4 KiB 55-65 %, none 40 %; on a Sapphire Rapids 4 KiB were enough for all of it, and a
// hint for the first level gave 63-82 %.
constexpr int64_t kPrefetchBytes = 8192;

template <class Isa, class L>
struct BlockScales {
    typename Isa::F scale;    // of the block, or of its first half
    typename Isa::F second;   // minimum (added, or subtracted for super-blocks), or second half

    static BlockScales load(const uint8_t* meta, int64_t b) {
        BlockScales out;
        if constexpr (L::kSuperBlocks) {
            const uint8_t* super = meta + b / 8 * 320;
            const uint8_t* factors = super + 64 + b % 8 * 32;
            const auto d = Isa::load_half(super);
            if constexpr (L::kScales == Scales::kSuperOne) {
                out.scale = Isa::multiply(d, Isa::load_i8(factors));
                out.second = Isa::zero();
            } else if constexpr (L::kHalves) {
                out.scale = Isa::multiply(d, Isa::load_i8(factors));
                out.second = Isa::multiply(d, Isa::load_i8(factors + 16));
            } else {
                out.scale = Isa::multiply(d, Isa::load_u8(factors));
                out.second =
                    Isa::multiply(Isa::load_half(super + 32), Isa::load_u8(factors + 16));
            }
        } else {
            const uint8_t* record = meta + b * (L::kHasMin ? 64 : 32);
            out.scale = L::kScales == Scales::kBrain ? Isa::load_brain(record)
                                                     : Isa::load_half(record);
            out.second = L::kHasMin ? Isa::load_half(record + 32) : Isa::zero();
        }
        return out;
    }
};

template <class Isa, class L, class Sum>
typename Isa::F block_term(const BlockScales<Isa, L>& weights, const BlockInfo& x,
                           const Sum (&dots)[L::kParts]) {
    const auto x_scale = Isa::set1(x.scale);
    if constexpr (L::kHalves) {
        const auto first = Isa::multiply(weights.scale, Isa::to_float(dots[0]));
        const auto second = Isa::multiply(weights.second, Isa::to_float(dots[1]));
        return Isa::multiply(Isa::add(first, second), x_scale);
    } else {
        const auto product =
            Isa::multiply(Isa::multiply(weights.scale, x_scale), Isa::to_float(dots[0]));
        if constexpr (!L::kHasMin) return product;
        const auto minimum = Isa::multiply(weights.second, Isa::set1(x.scaled_sum));
        return L::kSuperBlocks ? Isa::subtract(product, minimum) : Isa::add(product, minimum);
    }
}

// 16 rows x `Tokens` tokens.
template <class Isa, class L, Precision P, int Tokens>
void multiply_tile(const uint8_t* group, int64_t blocks, const int8_t* values,
                   const BlockInfo* infos, typename Isa::F (&sums)[Tokens]) {
    using Sum = typename Isa::template Sum<P>;
    constexpr bool kOffset = L::kHasOffset && !Isa::kSubtractsOffset;
    const uint8_t* payload = group + L::meta_bytes(blocks);
    const int64_t stride = blocks * kBlockBytes;
    for (int m = 0; m < Tokens; ++m) sums[m] = Isa::zero();
    // Meta and payload alike: what lies ahead of the payload alone would leave out a group's meta and
    // as much of the next group's payload.
    const int64_t block_bytes = L::group_bytes(blocks) / blocks;
    const uint8_t* ahead = group + kPrefetchBytes;
    for (int64_t b = 0; b < blocks; ++b, payload += L::kPayload, ahead += block_bytes) {
        for (int64_t line = 0; line < L::kPayload + 64; line += 64) {
            __builtin_prefetch(ahead + line, 0, 2);
        }
        Sum dots[Tokens][L::kParts];
        for (int m = 0; m < Tokens; ++m) {
            [[maybe_unused]] const BlockInfo& x = infos[m * blocks + b];
            [[maybe_unused]] const int32_t* negative = L::kHalves ? x.negative_half_sums : &x.negative_sum;
            for (int part = 0; part < L::kParts; ++part) {
                if constexpr (kOffset) {
                    Isa::start(negative[part], L::kOffsetShift, dots[m][part]);
                } else {
                    Isa::start(dots[m][part]);
                }
            }
        }
        Isa::template dot<L, Tokens>(payload, values + b * Isa::block_bytes(P), stride, dots);
        const auto scales = BlockScales<Isa, L>::load(group, b);
        for (int m = 0; m < Tokens; ++m) {
            const auto term = block_term<Isa, L>(scales, infos[m * blocks + b], dots[m]);
            sums[m] = Isa::add(sums[m], term);
        }
    }
}

// Tokens in tiles of at most `Tokens`, the rest in smaller ones (exact products: in single ones,
// since each size costs compile time).
template <class Isa, class L, Precision P, int Tokens>
void multiply_group(const uint8_t* group, int64_t blocks, const Activation& x, int64_t first,
                    int64_t num_tokens, const Output& out) {
    for (; first + Tokens <= num_tokens; first += Tokens) {
        typename Isa::F sums[Tokens];
        multiply_tile<Isa, L, P, Tokens>(group, blocks, x.values + first * blocks * kBlockBytes,
                                      x.infos + first * blocks, sums);
        for (int m = 0; m < Tokens; ++m) out.template store<Isa>(sums[m], first + m);
    }
    if constexpr (Tokens > 1) {
        constexpr int kNext = P == Precision::kExact ? 1 : Tokens / 2;
        multiply_group<Isa, L, P, kNext>(group, blocks, x, first, num_tokens, out);
    }
}

// The tokens of one pass over some groups: their integers and the groups stay in the caches.
constexpr int64_t kPassTokens = 32;

template <class Isa, class L, Precision P>
void multiply_range(const Matrix& matrix, const Activation& x, int64_t num_tokens, int64_t begin,
                    int64_t end, const Destination& to) {
    const int64_t blocks = matrix.columns / kBlock;
    for (int64_t first = 0; first < num_tokens; first += kPassTokens) {
        const int64_t left = num_tokens - first;
        const int64_t last = left < kPassTokens ? num_tokens : first + kPassTokens;
        for (int64_t g = begin; g < end; ++g) {
            multiply_group<Isa, L, P, Isa::tile_tokens(P, L::kParts)>(
                matrix.packed + g * L::group_bytes(blocks), blocks, x, first, last,
                Output(matrix, g, to));
        }
    }
}

template <class Isa>
void multiply_groups(const Matrix& matrix, const Activation& x, int64_t num_tokens, int64_t begin,
                     int64_t end, float* y, int64_t y_stride, bool accumulate) {
    const Destination to{y, y_stride, accumulate};
    visit_layout(matrix.type, [&](auto layout) {
        using L = decltype(layout);
        if (!Isa::kHasFastSums || matrix.precision == Precision::kExact) {
            multiply_range<Isa, L, Precision::kExact>(matrix, x, num_tokens, begin, end, to);
        } else if constexpr (Isa::kHasFastSums) {
            multiply_range<Isa, L, Precision::kFast>(matrix, x, num_tokens, begin, end, to);
        }
    });
    visit_dense(matrix.type, [&](auto dense) {
        multiply_dense<Isa, decltype(dense)>(matrix, x, num_tokens, begin, end, to);
    });
}

template <class Isa, Precision P>
void quantize_row(const float* x, int64_t blocks, int8_t* values, BlockInfo* infos) {
    constexpr uint32_t kInfinityBits = 0x7f800000;
    constexpr float kSmallest = 1e-30f;  // below it kLargest / largest would overflow
    constexpr float kLargest = largest_integer(P);
    for (int64_t b = 0; b < blocks; ++b, x += kBlock, values += Isa::block_bytes(P)) {
        const uint32_t bits = Isa::largest_magnitude(x);
        float largest;
        std::memcpy(&largest, &bits, 4);
        if (bits >= kInfinityBits || largest < kSmallest) {
            // Zeros, or a poisoned row: NaN must reach the logits, where it is detected.
            const float scale =
                bits >= kInfinityBits ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
            std::memset(values, 0, static_cast<size_t>(Isa::block_bytes(P)));
            infos[b] = BlockInfo{scale, scale, 0, {0, 0}};
            continue;
        }
        int32_t sums[2];
        Isa::template quantize<P>(x, kLargest / largest, values, sums);
        const float scale = largest / kLargest;
        const int32_t sum = sums[0] + sums[1];
        infos[b] = BlockInfo{scale, scale * static_cast<float>(sum), -sum, {-sums[0], -sums[1]}};
    }
}

template <class Isa>
void quantize(const float* x, int64_t blocks, Precision precision, int8_t* values,
              BlockInfo* infos) {
    if (precision == Precision::kExact) {
        quantize_row<Isa, Precision::kExact>(x, blocks, values, infos);
    } else {
        quantize_row<Isa, Precision::kFast>(x, blocks, values, infos);
    }
}

}  // namespace
}  // namespace cortexd
