// 16 lanes with AVX-512 (F, BW, DQ, VL) and VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "packed.h"

namespace cortexd {
namespace {

struct Avx512 {
    // 8 tokens: 8 or (of halves) 16 integer and 8 float accumulators and the weights fit in the 32
    // registers. So do 4 tokens of 16 bits.
    static constexpr int tile_tokens(Precision p, int) {
        return p == Precision::kExact ? 4 : 8;
    }
    // Whether 8-bit integers are laid out and multiplied in another way than 16-bit ones.
    static constexpr bool kHasFastSums = true;
    static constexpr int64_t block_bytes(Precision p) { return p == Precision::kExact ? 64 : 32; }
    // 16 accumulators and 8 weights of the dense kernels.
    static constexpr int kDenseGroups = 4;
    static constexpr int kDenseTokens = 4;
    // Sums that reduce_each folds side by side.
    static constexpr int kScoreSums = 16;
    // Vectors of 16 columns that the delta rule takes side by side.
    static constexpr int kDeltaVectors = 2;
    // Whether dot() already subtracts the offset of the stored integers.
    static constexpr bool kSubtractsOffset = false;
    using F = __m512;
    using I = __m512i;
    // 256 * high + low: products with the two bytes of 16-bit activations.
    struct ExactSum {
        I high;
        I low;
    };
    struct FastSum {
        I value;
    };
    template <Precision P>
    using Sum = std::conditional_t<P == Precision::kExact, ExactSum, FastSum>;

    static F zero() { return _mm512_setzero_ps(); }
    static F set1(float value) { return _mm512_set1_ps(value); }
    static F load(const float* from) { return _mm512_loadu_ps(from); }
    static void store(float* to, F value) { _mm512_storeu_ps(to, value); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F subtract(F a, F b) { return _mm512_sub_ps(a, b); }
    static F multiply(F a, F b) { return _mm512_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F divide(F a, F b) { return _mm512_div_ps(a, b); }
    // The second operand where one is NaN.
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static float reduce_add(F value) {
        const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(value),
                                           _mm512_extractf32x8_ps(value, 1));
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        four = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
    }
    // Holds a value of several uses in a register: the compiler would load it again for each, and one
    // load per cycle is all there is.
    static void keep(F& value) { asm("" : "+v"(value)); }
    // to[i] = reduce_add(values[i]), with the same additions.
    template <int Count>
    static void reduce_each(const F (&values)[Count], float* to) {
        if constexpr (Count == 16) {
            F eights[8], fours[4], twos[2];
            // The order that leaves the sums in theirs.
            for (int i = 0; i < 8; ++i) {
                const F &a = values[i % 2 * 8 + i / 2], &b = values[i % 2 * 8 + 4 + i / 2];
                eights[i] = add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
            }
            for (int i = 0; i < 4; ++i) {
                const F &a = eights[2 * i], &b = eights[2 * i + 1];
                fours[i] = add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
            }
            for (int i = 0; i < 2; ++i) {
                const F &a = fours[2 * i], &b = fours[2 * i + 1];
                twos[i] = add(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
            }
            store(to, add(_mm512_shuffle_ps(twos[0], twos[1], 0x88),
                          _mm512_shuffle_ps(twos[0], twos[1], 0xdd)));
        } else {
            for (int i = 0; i < Count; ++i) to[i] = reduce_add(values[i]);
        }
    }
    static float reduce_max(F value) { return _mm512_reduce_max_ps(value); }
    static F power_of_two(F biased) {
        const I bits = _mm512_slli_epi32(_mm512_castps_si512(biased), 23);
        return _mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_set1_epi32(0x3f800000)));
    }
    static F to_float(const ExactSum& sum) {
        return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sum.high, 8), sum.low));
    }
    static F to_float(const FastSum& sum) { return _mm512_cvtepi32_ps(sum.value); }
    static __m128i load_16_bytes(const uint8_t* from) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    }
    static F load_u8(const uint8_t* from) {
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_16_bytes(from)));
    }
    static F load_i8(const uint8_t* from) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_16_bytes(from)));
    }
    static F load_half(const uint8_t* from) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }

    static F load_brain(const uint8_t* from) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }

    static void load_bf16_pair(const uint8_t* from, F& first, F& second) {
        const I words = _mm512_loadu_si512(from);
        const I high = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000));
        first = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
        second = _mm512_castsi512_ps(_mm512_and_si512(words, high));
    }

    static I broadcast_quad(const int8_t* x) {
        int32_t quad;
        std::memcpy(&quad, x, 4);
        return _mm512_set1_epi32(quad);
    }
    // Bit 4 (5-bit types) or bits 4-5 (6-bit types) of the stored integers of a quad.
    template <class L, int Quad>
    static I high_bits(const uint8_t* payload) {
        if constexpr (L::kBits == 5) {
            const I line = _mm512_loadu_si512(payload + 256);
            const I shifted = Quad <= 4 ? _mm512_slli_epi16(line, 4 - (Quad <= 4 ? Quad : 4))
                                        : _mm512_srli_epi16(line, Quad > 4 ? Quad - 4 : 0);
            return _mm512_and_si512(shifted, _mm512_set1_epi8(0x10));
        } else {
            constexpr int kShift = Quad % 4 * 2;
            const I line = _mm512_loadu_si512(payload + 256 + Quad / 4 * 64);
            const I shifted = kShift <= 4 ? _mm512_slli_epi16(line, 4 - (kShift <= 4 ? kShift : 4))
                                          : _mm512_srli_epi16(line, kShift > 4 ? kShift - 4 : 0);
            return _mm512_and_si512(shifted, _mm512_set1_epi8(0x30));
        }
    }
    // x: the high bytes of a block's 32 integers, then the low bytes.
    static void add_products(I weights, const int8_t* x, ExactSum& sum) {
        sum.high = _mm512_dpbusd_epi32(sum.high, weights, broadcast_quad(x));
        sum.low = _mm512_dpbusd_epi32(sum.low, weights, broadcast_quad(x + kBlock));
    }
    static void add_products(I weights, const int8_t* x, FastSum& sum) {
        sum.value = _mm512_dpbusd_epi32(sum.value, weights, broadcast_quad(x));
    }
    // The stored integers of Quad and Quad + 4: the two nibbles of one line, or two lines.
    template <class L, int Quad>
    static void unpack(const uint8_t* payload, I& first, I& second) {
        if constexpr (L::kBits == 8) {
            first = _mm512_loadu_si512(payload + Quad * 64);
            second = _mm512_loadu_si512(payload + (Quad + 4) * 64);
        } else {
            const I mask = _mm512_set1_epi8(15);
            const I line = _mm512_loadu_si512(payload + Quad * 64);
            first = _mm512_and_si512(line, mask);
            second = _mm512_and_si512(_mm512_srli_epi16(line, 4), mask);
            if constexpr (L::kBits > 4) {
                first = _mm512_or_si512(first, high_bits<L, Quad>(payload));
                second = _mm512_or_si512(second, high_bits<L, Quad + 4>(payload));
            }
            if constexpr (L::kCode != Code::kPlain) {
                const I table = _mm512_broadcast_i32x4(load_16_bytes(L::kTable));
                first = _mm512_shuffle_epi8(table, first);
                second = _mm512_shuffle_epi8(table, second);
            }
        }
    }
    template <class L, int Quad, int Tokens, class Sum>
    static void dot_line(const uint8_t* payload, const int8_t* x, int64_t stride,
                         Sum (&sums)[Tokens][L::kParts]) {
        I first, second;
        unpack<L, Quad>(payload, first, second);
        for (int m = 0; m < Tokens; ++m) {
            const int8_t* q = x + m * stride + Quad * 4;
            add_products(first, q, sums[m][0]);
            add_products(second, q + 16, sums[m][L::kParts - 1]);
        }
    }
    template <class L, int Tokens, class Sum>
    static void dot(const uint8_t* payload, const int8_t* x, int64_t stride,
                    Sum (&sums)[Tokens][L::kParts]) {
        dot_line<L, 0>(payload, x, stride, sums);
        dot_line<L, 1>(payload, x, stride, sums);
        dot_line<L, 2>(payload, x, stride, sums);
        dot_line<L, 3>(payload, x, stride, sums);
    }
    static void start(ExactSum& sum) { sum.high = sum.low = _mm512_setzero_si512(); }
    static void start(FastSum& sum) { sum.value = _mm512_setzero_si512(); }
    static I shifted(int32_t value, int shift) {
        return _mm512_slli_epi32(_mm512_set1_epi32(value), static_cast<unsigned>(shift));
    }
    static void start(int32_t value, int shift, ExactSum& sum) {
        sum.high = _mm512_setzero_si512();
        sum.low = shifted(value, shift);
    }
    static void start(int32_t value, int shift, FastSum& sum) {
        sum.value = shifted(value, shift);
    }

    static uint32_t largest_magnitude(const float* x) {
        const I mask = _mm512_set1_epi32(0x7fffffff);
        const I a = _mm512_and_si512(_mm512_loadu_si512(x), mask);
        const I b = _mm512_and_si512(_mm512_loadu_si512(x + 16), mask);
        return _mm512_reduce_max_epu32(_mm512_max_epu32(a, b));
    }
    template <Precision P>
    static void quantize(const float* x, float inverse, int8_t* q, int32_t* sums) {
        const F scale = _mm512_set1_ps(inverse);
        for (int half = 0; half < 2; ++half) {
            const I value = _mm512_cvtps_epi32(_mm512_mul_ps(load(x + half * 16), scale));
            sums[half] = _mm512_reduce_add_epi32(value);
            if constexpr (P == Precision::kFast) {
                store_bytes(q + half * 16, value);
                continue;
            }
            // The low byte, read as a signed one, is value - 256 * high.
            const I high = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(128)), 8);
            store_bytes(q + half * 16, high);
            store_bytes(q + kBlock + half * 16, value);
        }
    }
    static void store_bytes(int8_t* to, I value) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(value));
    }
};

}  // namespace
}  // namespace cortexd
