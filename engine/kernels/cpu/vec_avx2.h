// 16 lanes as two halves of 8 with AVX2 and F16C (no dot-product instruction needed).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "packed.h"

namespace cortexd {
namespace {

struct Avx2 {
    // 16 registers hold no more.
    static constexpr int tile_tokens(Precision, int parts) { return 2 / parts; }
    static constexpr bool kHasFastSums = false;
    static constexpr int64_t block_bytes(Precision) { return 64; }  // always widened to 16 bits
    static constexpr int kDenseGroups = 2;
    static constexpr int kDenseTokens = 2;
    static constexpr int kScoreSums = 1;
    // Vectors of 16 columns that the delta rule takes side by side.
    static constexpr int kDeltaVectors = 1;
    // Whether dot() already subtracts the offset of the stored integers.
    static constexpr bool kSubtractsOffset = false;
    struct F {
        __m256 half[2];
    };
    struct I {
        __m256i half[2];
    };
    template <Precision>
    using Sum = I;

    static F zero() { return set1(0.0f); }
    static F set1(float value) { return {{_mm256_set1_ps(value), _mm256_set1_ps(value)}}; }
    static F load(const float* from) {
        return {{_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}};
    }
    static void store(float* to, const F& value) {
        _mm256_storeu_ps(to, value.half[0]);
        _mm256_storeu_ps(to + 8, value.half[1]);
    }
    static F add(const F& a, const F& b) {
        return {{_mm256_add_ps(a.half[0], b.half[0]), _mm256_add_ps(a.half[1], b.half[1])}};
    }
    static F subtract(const F& a, const F& b) {
        return {{_mm256_sub_ps(a.half[0], b.half[0]), _mm256_sub_ps(a.half[1], b.half[1])}};
    }
    static F multiply(const F& a, const F& b) {
        return {{_mm256_mul_ps(a.half[0], b.half[0]), _mm256_mul_ps(a.half[1], b.half[1])}};
    }
    static F fma(const F& a, const F& b, const F& c) {
        return {{_mm256_fmadd_ps(a.half[0], b.half[0], c.half[0]),
                 _mm256_fmadd_ps(a.half[1], b.half[1], c.half[1])}};
    }
    static F divide(const F& a, const F& b) {
        return {{_mm256_div_ps(a.half[0], b.half[0]), _mm256_div_ps(a.half[1], b.half[1])}};
    }
    // The second operand where one is NaN.
    static F max(const F& a, const F& b) {
        return {{_mm256_max_ps(a.half[0], b.half[0]), _mm256_max_ps(a.half[1], b.half[1])}};
    }
    static F min(const F& a, const F& b) {
        return {{_mm256_min_ps(a.half[0], b.half[0]), _mm256_min_ps(a.half[1], b.half[1])}};
    }
    static float reduce_add(const F& value) {
        const __m256 eight = _mm256_add_ps(value.half[0], value.half[1]);
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        four = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
    }
    static void keep(const F&) {}
    template <int Count>
    static void reduce_each(const F (&values)[Count], float* to) {
        for (int i = 0; i < Count; ++i) to[i] = reduce_add(values[i]);
    }
    static float reduce_max(const F& value) {
        const __m256 eight = _mm256_max_ps(value.half[0], value.half[1]);
        __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        four = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
    }
    static __m256 power_of_two(__m256 biased) {
        const __m256i bits = _mm256_slli_epi32(_mm256_castps_si256(biased), 23);
        return _mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_set1_epi32(0x3f800000)));
    }
    static F power_of_two(const F& biased) {
        return {{power_of_two(biased.half[0]), power_of_two(biased.half[1])}};
    }
    static F to_float(const I& value) {
        return {{_mm256_cvtepi32_ps(value.half[0]), _mm256_cvtepi32_ps(value.half[1])}};
    }
    static __m128i load_16_bytes(const uint8_t* from) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    }
    static F load_u8(const uint8_t* from) {
        const __m128i bytes = load_16_bytes(from);
        return to_float({{_mm256_cvtepu8_epi32(bytes),
                          _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))}});
    }
    static F load_i8(const uint8_t* from) {
        const __m128i bytes = load_16_bytes(from);
        return to_float({{_mm256_cvtepi8_epi32(bytes),
                          _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))}});
    }
    static F load_half(const uint8_t* from) {
        return {{_mm256_cvtph_ps(load_16_bytes(from)), _mm256_cvtph_ps(load_16_bytes(from + 16))}};
    }

    static F load_brain(const uint8_t* from) {
        F out;
        for (int half = 0; half < 2; ++half) {
            const __m256i words = _mm256_cvtepu16_epi32(load_16_bytes(from + half * 16));
            out.half[half] = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
        }
        return out;
    }

    static void load_bf16_pair(const uint8_t* from, F& first, F& second) {
        const __m256i high = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
        for (int half = 0; half < 2; ++half) {
            const __m256i words = load_line(from + half * 32);
            first.half[half] = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
            second.half[half] = _mm256_castsi256_ps(_mm256_and_si256(words, high));
        }
    }

    static __m256i load_line(const uint8_t* line) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line));
    }
    // The stored integers of one quad for 8 rows (32 bytes; `part` 0 or 1 picks the rows).
    template <class L>
    static __m256i stored(const uint8_t* payload, int quad, int part) {
        const int64_t offset = part * 32;
        if constexpr (L::kBits == 8) return load_line(payload + quad * 64 + offset);
        const __m256i line = load_line(payload + quad % 4 * 64 + offset);
        const __m256i nibble = quad < 4 ? line : _mm256_srli_epi16(line, 4);
        __m256i value = _mm256_and_si256(nibble, _mm256_set1_epi8(15));
        if constexpr (L::kBits == 5) {
            const __m256i bits = load_line(payload + 256 + offset);
            const __m256i shifted =
                quad <= 4 ? _mm256_slli_epi16(bits, 4 - quad) : _mm256_srli_epi16(bits, quad - 4);
            value = _mm256_or_si256(value, _mm256_and_si256(shifted, _mm256_set1_epi8(0x10)));
        }
        if constexpr (L::kBits == 6) {
            const int shift = quad % 4 * 2;
            const __m256i bits = load_line(payload + 256 + quad / 4 * 64 + offset);
            const __m256i shifted = shift <= 4 ? _mm256_slli_epi16(bits, 4 - shift)
                                               : _mm256_srli_epi16(bits, shift - 4);
            value = _mm256_or_si256(value, _mm256_and_si256(shifted, _mm256_set1_epi8(0x30)));
        }
        if constexpr (L::kCode != Code::kPlain) {
            value = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_16_bytes(L::kTable)), value);
        }
        return value;
    }
    static __m256i broadcast_pair(const int8_t* x) {
        int32_t pair;
        std::memcpy(&pair, x, 4);
        return _mm256_set1_epi32(pair);
    }
    // x: 16-bit integers; of each quad elements 0, 2, 1, 3, as the bytes of a quad of weights are
    // widened to 16 bits by taking the even and the odd ones.
    template <class L, int Tokens>
    static void dot(const uint8_t* payload, const int8_t* x, int64_t stride,
                    I (&sums)[Tokens][L::kParts]) {
        const __m256i mask = _mm256_set1_epi16(255);
        for (int part = 0; part < 2; ++part) {
            for (int quad = 0; quad < 8; ++quad) {
                const __m256i weights = stored<L>(payload, quad, part);
                const __m256i even = _mm256_and_si256(weights, mask);
                const __m256i odd = _mm256_srli_epi16(weights, 8);
                for (int m = 0; m < Tokens; ++m) {
                    const int8_t* q = x + m * stride + quad * 8;
                    const __m256i products =
                        _mm256_add_epi32(_mm256_madd_epi16(even, broadcast_pair(q)),
                                         _mm256_madd_epi16(odd, broadcast_pair(q + 4)));
                    __m256i& sum = sums[m][quad < 4 ? 0 : L::kParts - 1].half[part];
                    sum = _mm256_add_epi32(sum, products);
                }
            }
        }
    }
    static void start(I& sum) { sum.half[0] = sum.half[1] = _mm256_setzero_si256(); }
    static void start(int32_t value, int shift, I& sum) {
        sum.half[0] = sum.half[1] = _mm256_slli_epi32(_mm256_set1_epi32(value), shift);
    }

    static uint32_t largest_magnitude(const float* x) {
        const __m256i mask = _mm256_set1_epi32(0x7fffffff);
        __m256i largest = _mm256_setzero_si256();
        for (int i = 0; i < 32; i += 8) {
            const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(x + i));
            largest = _mm256_max_epu32(largest, _mm256_and_si256(bits, mask));
        }
        __m128i four = _mm_max_epu32(_mm256_castsi256_si128(largest),
                                     _mm256_extracti128_si256(largest, 1));
        four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
        four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0xb1));
        return static_cast<uint32_t>(_mm_cvtsi128_si32(four));
    }
    static int32_t sum_lanes(__m256i value) {
        __m128i four = _mm_add_epi32(_mm256_castsi256_si128(value),
                                     _mm256_extracti128_si256(value, 1));
        four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1));
        return _mm_cvtsi128_si32(four);
    }
    template <Precision>
    static void quantize(const float* x, float inverse, int8_t* q, int32_t* sums) {
        const __m256 scale = _mm256_set1_ps(inverse);
        // Of each quad elements 0, 2, 1, 3.
        const __m256i order = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
        for (int half = 0; half < 2; ++half) {
            const float* from = x + half * 16;
            const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from), scale));
            const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + 8), scale));
            const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + half * 32),
                                _mm256_shuffle_epi8(words, order));
            sums[half] = sum_lanes(_mm256_add_epi32(a, b));
        }
    }
};

}  // namespace
}  // namespace cortexd
