// Norms, activation and rotation of one token, for any instruction set.
#pragma once

#include <cmath>
#include <cstdint>

#include "packed.h"

namespace cortexd {
namespace {

// e^x to about 2 units in the last place; NaN stays NaN, -inf gives about 1e-38.
// The polynomial is the well-known single-precision one of the Cephes library.
template <class Isa>
typename Isa::F exponential(typename Isa::F x) {
    using F = typename Isa::F;
    x = Isa::min(Isa::set1(88.37f), Isa::max(Isa::set1(-87.33f), x));
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low mantissa bits.
    const F magic = Isa::set1(12582912.0f);
    const F biased = Isa::fma(x, Isa::set1(1.44269504f), magic);
    const F n = Isa::subtract(biased, magic);
    F r = Isa::fma(n, Isa::set1(-0.693359375f), x);
    r = Isa::fma(n, Isa::set1(2.12194440e-4f), r);
    F p = Isa::set1(1.9875691500e-4f);
    p = Isa::fma(p, r, Isa::set1(1.3981999507e-3f));
    p = Isa::fma(p, r, Isa::set1(8.3334519073e-3f));
    p = Isa::fma(p, r, Isa::set1(4.1665795894e-2f));
    p = Isa::fma(p, r, Isa::set1(1.6666665459e-1f));
    p = Isa::fma(p, r, Isa::set1(5.0000001201e-1f));
    p = Isa::add(Isa::fma(p, Isa::multiply(r, r), r), Isa::set1(1.0f));
    return Isa::multiply(p, Isa::power_of_two(biased));
}

// y = x / sqrt(mean(x^2) + eps) * weight; size is a multiple of 16; y may be x.
template <class Isa>
void rms_norm(const float* x, const float* weight, float eps, int64_t size, float* y) {
    auto squares = Isa::zero();
    for (int64_t i = 0; i < size; i += kRows) {
        const auto value = Isa::load(x + i);
        squares = Isa::fma(value, value, squares);
    }
    const float mean = Isa::reduce_add(squares) / static_cast<float>(size);
    const auto scale = Isa::set1(1.0f / std::sqrt(mean + eps));
    for (int64_t i = 0; i < size; i += kRows) {
        Isa::store(y + i, Isa::multiply(Isa::multiply(Isa::load(x + i), scale),
                                        Isa::load(weight + i)));
    }
}

// out = gate / (1 + e^-gate) * up; size is a multiple of 16; out may be gate.
template <class Isa>
void silu_mul(const float* gate, const float* up, int64_t size, float* out) {
    const auto one = Isa::set1(1.0f);
    for (int64_t i = 0; i < size; i += kRows) {
        const auto g = Isa::load(gate + i);
        const auto denominator =
            Isa::add(one, exponential<Isa>(Isa::subtract(Isa::zero(), g)));
        Isa::store(out + i, Isa::multiply(Isa::divide(g, denominator), Isa::load(up + i)));
    }
}

// y += factor * x; size is a multiple of 16.
template <class Isa>
void add_scaled(const float* x, float factor, int64_t size, float* y) {
    const auto weight = Isa::set1(factor);
    for (int64_t i = 0; i < size; i += kRows) {
        Isa::store(y + i, Isa::fma(weight, Isa::load(x + i), Isa::load(y + i)));
    }
}

// out = x / (1 + e^-gate); size is a multiple of 16; out may be x.
template <class Isa>
void sigmoid_mul(const float* gate, const float* x, int64_t size, float* out) {
    const auto one = Isa::set1(1.0f);
    for (int64_t i = 0; i < size; i += kRows) {
        const auto negative = Isa::subtract(Isa::zero(), Isa::load(gate + i));
        const auto denominator = Isa::add(one, exponential<Isa>(negative));
        Isa::store(out + i, Isa::divide(Isa::load(x + i), denominator));
    }
}

// Element j of a head turns with element j + half; cos and sin hold `half` values.
template <class Isa>
void rotate(float* head, const float* cos, const float* sin, int64_t half) {
    int64_t j = 0;
    for (; j + kRows <= half; j += kRows) {
        const auto c = Isa::load(cos + j), s = Isa::load(sin + j);
        const auto a = Isa::load(head + j), b = Isa::load(head + half + j);
        Isa::store(head + j, Isa::subtract(Isa::multiply(a, c), Isa::multiply(b, s)));
        Isa::store(head + half + j, Isa::add(Isa::multiply(b, c), Isa::multiply(a, s)));
    }
    for (; j < half; ++j) {
        const float a = head[j], b = head[half + j];
        head[j] = a * cos[j] - b * sin[j];
        head[half + j] = b * cos[j] + a * sin[j];
    }
}

}  // namespace
}  // namespace cortexd
