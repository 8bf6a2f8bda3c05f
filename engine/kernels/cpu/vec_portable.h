// 16 lanes in plain C++: the fallback on any CPU, and the definition of what the others compute.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "packed.h"

namespace cortexd {
namespace {

struct Portable {
    static constexpr int tile_tokens(Precision, int parts) { return 2 / parts; }
    static constexpr bool kHasFastSums = false;
    static constexpr int64_t block_bytes(Precision) { return 64; }  // always of two bytes each
    static constexpr int kDenseGroups = 1;
    static constexpr int kDenseTokens = 2;
    static constexpr int kScoreSums = 1;
    // Vectors of 16 columns that the delta rule takes side by side.
    static constexpr int kDeltaVectors = 1;
    // Whether dot() already subtracts the offset of the stored integers.
    static constexpr bool kSubtractsOffset = true;
    struct F {
        float lane[16];
    };
    // 256 * high + low: products with the two bytes of 16-bit activations. Each is an integer of at
    // most 128 * 128 * 32 < 2^24, so exact in floats, which every vector unit multiplies fast.
    struct TwoSums {
        float high[16];
        float low[16];
    };
    template <Precision>
    using Sum = TwoSums;

    template <class Function>
    static F map(Function function) {
        F out;
        for (int i = 0; i < 16; ++i) out.lane[i] = function(i);
        return out;
    }

    static F zero() { return set1(0.0f); }
    static F set1(float value) {
        return map([&](int) { return value; });
    }
    static F load(const float* from) {
        return map([&](int i) { return from[i]; });
    }
    static void store(float* to, const F& value) { std::memcpy(to, value.lane, sizeof(F)); }
    static F add(const F& a, const F& b) {
        return map([&](int i) { return a.lane[i] + b.lane[i]; });
    }
    static F subtract(const F& a, const F& b) {
        return map([&](int i) { return a.lane[i] - b.lane[i]; });
    }
    static F multiply(const F& a, const F& b) {
        return map([&](int i) { return a.lane[i] * b.lane[i]; });
    }
    // a * b + c; fused where the instruction set can, so only sums that may differ between
    // instruction sets use it.
    static F fma(const F& a, const F& b, const F& c) { return add(multiply(a, b), c); }
    static F divide(const F& a, const F& b) {
        return map([&](int i) { return a.lane[i] / b.lane[i]; });
    }
    // The second operand where one is NaN, so put what may be poisoned there.
    static F max(const F& a, const F& b) {
        return map([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    static F min(const F& a, const F& b) {
        return map([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    // Lanes are folded in halves: i with i + 8, then + 4, + 2, + 1.
    static float reduce_add(F value) {
        for (int width = 8; width > 0; width /= 2) {
            for (int i = 0; i < width; ++i) value.lane[i] += value.lane[i + width];
        }
        return value.lane[0];
    }
    static void keep(const F&) {}
    template <int Count>
    static void reduce_each(const F (&values)[Count], float* to) {
        for (int i = 0; i < Count; ++i) to[i] = reduce_add(values[i]);
    }
    static float reduce_max(const F& value) {
        float largest = value.lane[0];
        for (int i = 1; i < 16; ++i) {
            largest = largest > value.lane[i] ? largest : value.lane[i];
        }
        return largest;
    }
    // 2^n for floats of the form 1.5 * 2^23 + n.
    static F power_of_two(const F& biased) {
        return map([&](int i) {
            uint32_t bits;
            float out;
            std::memcpy(&bits, &biased.lane[i], 4);
            bits = (bits << 23) + 0x3f800000;
            std::memcpy(&out, &bits, 4);
            return out;
        });
    }
    // Rounded once, in the last addition, like the conversion of a whole integer.
    static F to_float(const TwoSums& sum) {
        return map([&](int i) { return sum.high[i] * 256.0f + sum.low[i]; });
    }
    static F load_u8(const uint8_t* from) {
        return map([&](int i) { return static_cast<float>(from[i]); });
    }
    static F load_i8(const uint8_t* from) {
        return map([&](int i) { return static_cast<float>(static_cast<int8_t>(from[i])); });
    }

    static F load_brain(const uint8_t* from) {
        return map([&](int i) {
            uint16_t half;
            std::memcpy(&half, from + i * 2, 2);
            const uint32_t bits = static_cast<uint32_t>(half) << 16;
            float value;
            std::memcpy(&value, &bits, 4);
            return value;
        });
    }

    static void load_bf16_pair(const uint8_t* from, F& first, F& second) {
        uint32_t words[16];
        std::memcpy(words, from, 64);
        for (int i = 0; i < 16; ++i) {
            const uint32_t low = words[i] << 16, high = words[i] & 0xffff0000;
            std::memcpy(&first.lane[i], &low, 4);
            std::memcpy(&second.lane[i], &high, 4);
        }
    }

    static float half_to_float(uint16_t half) {
        const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
        const uint32_t magnitude = half & 0x7fff;
        float value;
        if (magnitude >= 0x7c00) {  // infinity, NaN
            const uint32_t bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
            std::memcpy(&value, &bits, 4);
            return value;
        }
        if (magnitude < 0x400) {  // zero, subnormal: magnitude * 2^-24 is exact
            value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
            return sign != 0 ? -value : value;
        }
        const uint32_t bits = sign | ((magnitude << 13) + (uint32_t{112} << 23));
        std::memcpy(&value, &bits, 4);
        return value;
    }
    static F load_half(const uint8_t* from) {
        return map([&](int i) {
            uint16_t half;
            std::memcpy(&half, from + i * 2, 2);
            return half_to_float(half);
        });
    }

    // The stored integers of quad `quad`: one word per row, its 4 elements from the lowest byte on.
    template <class L>
    static void load_stored(const uint8_t* payload, int quad, uint32_t (&words)[16]) {
        static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are read as bytes");
        if constexpr (L::kBits == 8) {
            std::memcpy(words, payload + quad * 64, 64);
            return;
        }
        std::memcpy(words, payload + quad % 4 * 64, 64);
        for (uint32_t& word : words) word = word >> (quad / 4 * 4) & 0x0f0f0f0f;
        if constexpr (L::kBits == 5) {
            uint32_t bits[16];
            std::memcpy(bits, payload + 256, 64);
            for (int r = 0; r < 16; ++r) words[r] |= (bits[r] >> quad & 0x01010101) << 4;
        }
        if constexpr (L::kBits == 6) {
            uint32_t bits[16];
            std::memcpy(bits, payload + 256 + quad / 4 * 64, 64);
            for (int r = 0; r < 16; ++r) words[r] |= (bits[r] >> (quad % 4 * 2) & 0x03030303) << 4;
        }
    }

    // x: the high bytes of a block's 32 integers, then the low bytes.
    template <class L, int Tokens>
    static void dot(const uint8_t* payload, const int8_t* x, int64_t stride,
                    TwoSums (&sums)[Tokens][L::kParts]) {
        constexpr int kOffset = L::kHasOffset ? 1 << (L::kHasOffset ? L::kOffsetShift : 0) : 0;
        for (int quad = 0; quad < 8; ++quad) {
            uint32_t words[16];
            load_stored<L>(payload, quad, words);
            for (int j = 0; j < 4; ++j) {
                float weights[16];
                for (int r = 0; r < 16; ++r) {
                    int stored = static_cast<int>(words[r] >> (8 * j) & 255);
                    if (L::kCode != Code::kPlain) stored = L::kTable[stored];
                    weights[r] = static_cast<float>(stored - kOffset);
                }
                for (int m = 0; m < Tokens; ++m) {
                    const int8_t* q = x + m * stride + quad * 4 + j;
                    const float high = q[0], low = q[kBlock];
                    TwoSums& sum = sums[m][quad < 4 ? 0 : L::kParts - 1];
                    for (int r = 0; r < 16; ++r) sum.high[r] += weights[r] * high;
                    for (int r = 0; r < 16; ++r) sum.low[r] += weights[r] * low;
                }
            }
        }
    }
    static void start(TwoSums& sum) { sum = TwoSums{}; }

    // Largest |x| of 32 values as bits: comparing bits lets NaN win over infinity over numbers.
    static uint32_t largest_magnitude(const float* x) {
        uint32_t largest = 0;
        for (int i = 0; i < kBlock; ++i) {
            uint32_t bits;
            std::memcpy(&bits, x + i, 4);
            bits &= 0x7fffffff;
            largest = bits > largest ? bits : largest;
        }
        return largest;
    }
    // q = round-half-even(x * inverse) for 32 values; returns the sums of both halves.
    template <Precision>
    static void quantize(const float* x, float inverse, int8_t* q, int32_t* sums) {
        constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction bits
        sums[0] = sums[1] = 0;
        for (int i = 0; i < kBlock; ++i) {
            const float rounded = (x[i] * inverse + kRound) - kRound;
            const int value = static_cast<int>(rounded);
            const int high = (value + 128 + 32768) / 256 - 128;  // rounds down without a shift
            q[i] = static_cast<int8_t>(high);
            q[kBlock + i] = static_cast<int8_t>(value - 256 * high);
            sums[i / 16] += value;
        }
    }
};

}  // namespace
}  // namespace cortexd
