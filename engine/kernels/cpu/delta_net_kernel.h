// The convolution and the gated delta rule of one head, for any instruction set; see delta_net.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "delta_net.h"
#include "elementwise_kernel.h"

namespace cortexd {
namespace {

constexpr float kLengthEps = 1e-6f;

template <class Isa>
void convolve(const ConvRun& run) {
    alignas(64) float window[kMaxConvKernel - 1][kMaxDeltaHeadDim];
    const int64_t kept = run.kernel - 1;
    const auto bytes = static_cast<size_t>(run.size) * sizeof(float);
    for (int64_t j = 0; j < kept; ++j) {
        if (run.is_fresh) {
            std::memset(window[j], 0, bytes);
        } else {
            std::memcpy(window[j], run.tail + j * run.channels, bytes);
        }
    }
    const auto one = Isa::set1(1.0f);
    int64_t oldest = 0;  // the window is a ring
    for (int64_t t = 0; t < run.num_tokens; ++t) {
        float* const x = run.x + t * run.stride;
        auto squares = Isa::zero();
        for (int64_t c = 0; c < run.size; c += kRows) {
            auto sum = Isa::zero();
            for (int64_t j = 0; j < kept; ++j) {
                const int64_t at = oldest + j < kept ? oldest + j : oldest + j - kept;
                sum = Isa::fma(Isa::load(run.weight + j * run.channels + c),
                               Isa::load(window[at] + c), sum);
            }
            const auto input = Isa::load(x + c);
            sum = Isa::fma(Isa::load(run.weight + kept * run.channels + c), input, sum);
            Isa::store(window[oldest] + c, input);
            const auto activated = Isa::divide(
                sum, Isa::add(one, exponential<Isa>(Isa::subtract(Isa::zero(), sum))));
            squares = Isa::fma(activated, activated, squares);
            Isa::store(x + c, activated);
        }
        oldest = oldest + 1 < kept ? oldest + 1 : 0;
        if (run.norm_scale == 0.0f) continue;
        const auto factor = Isa::set1(
            run.norm_scale / std::sqrt(Isa::reduce_add(squares) + kLengthEps));
        for (int64_t c = 0; c < run.size; c += kRows) {
            Isa::store(x + c, Isa::multiply(Isa::load(x + c), factor));
        }
    }
    for (int64_t j = 0; j < kept; ++j) {
        const int64_t at = oldest + j < kept ? oldest + j : oldest + j - kept;
        std::memcpy(run.tail + j * run.channels, window[at], bytes);
    }
}

// One token: S goes from `from` to `to`, `out` = S^T q, and, unless the token is the last of its run,
// `remembered` = S^T (next key). All rows in ascending order.
template <class Isa, int Vectors, bool IsLast>
void delta_token(const DeltaRun& run, int64_t t, const float* from, int64_t from_stride, float* to,
                 int64_t to_stride, typename Isa::F (&remembered)[Vectors]) {
    using F = typename Isa::F;
    const float* const query = run.query + t * run.stride;
    const float* const key = run.key + t * run.stride;
    const float* const next_key = key + (IsLast ? 0 : run.stride);
    const F decay = Isa::set1(run.decay[t * run.gate_stride]);
    const F beta = Isa::set1(run.beta[t * run.gate_stride]);
    F delta[Vectors], out[Vectors];
    for (int v = 0; v < Vectors; ++v) {
        const F value = Isa::load(run.value + t * run.stride + v * kRows);
        delta[v] = Isa::multiply(beta, Isa::subtract(value, Isa::multiply(decay, remembered[v])));
        out[v] = remembered[v] = Isa::zero();
    }
    for (int64_t r = 0; r < run.key_dim; ++r, from += from_stride, to += to_stride) {
        const F k = Isa::set1(key[r]), q = Isa::set1(query[r]);
        [[maybe_unused]] const F next = Isa::set1(next_key[r]);
        for (int v = 0; v < Vectors; ++v) {
            const F state =
                Isa::fma(k, delta[v], Isa::multiply(decay, Isa::load(from + v * kRows)));
            Isa::store(to + v * kRows, state);
            out[v] = Isa::fma(q, state, out[v]);
            if constexpr (!IsLast) remembered[v] = Isa::fma(next, state, remembered[v]);
        }
    }
    for (int v = 0; v < Vectors; ++v) {
        Isa::store(run.out + t * run.out_stride + v * kRows, out[v]);
    }
}

template <class Isa, int Vectors>
void delta_columns(const DeltaRun& run) {
    using F = typename Isa::F;
    constexpr int64_t kWidth = Vectors * kRows;
    const float* from = run.state;
    int64_t from_stride = run.state_stride;
    if (run.is_fresh) {
        std::memset(run.scratch, 0, static_cast<size_t>(run.key_dim * kWidth) * sizeof(float));
        from = run.scratch;
        from_stride = kWidth;
    }
    F remembered[Vectors];
    for (int v = 0; v < Vectors; ++v) remembered[v] = Isa::zero();
    for (int64_t r = 0; r < run.key_dim; ++r) {
        const F k = Isa::set1(run.key[r]);
        for (int v = 0; v < Vectors; ++v) {
            remembered[v] = Isa::fma(k, Isa::load(from + r * from_stride + v * kRows), remembered[v]);
        }
    }
    const int64_t last = run.num_tokens - 1;
    for (int64_t t = 0; t < last; ++t) {
        delta_token<Isa, Vectors, false>(run, t, from, from_stride, run.scratch, kWidth, remembered);
        from = run.scratch;
        from_stride = kWidth;
    }
    delta_token<Isa, Vectors, true>(run, last, from, from_stride, run.state, run.state_stride,
                                    remembered);
}

// All columns of `run`; how many side by side, changes no bit.
template <class Isa>
void delta_rule(DeltaRun run, int64_t columns) {
    const auto take = [&](auto vectors) {
        constexpr int kVectors = decltype(vectors)::value;
        constexpr int64_t kWidth = kVectors * kRows;
        for (; columns >= kWidth; columns -= kWidth) {
            delta_columns<Isa, kVectors>(run);
            run.value += kWidth;
            run.out += kWidth;
            run.state += kWidth;
        }
    };
    if constexpr (Isa::kDeltaVectors == 2) {
        // S of a single token comes from memory, and goes back: whole rows are read at full speed.
        if (run.num_tokens == 1 && !run.is_fresh) take(std::integral_constant<int, 8>{});
        take(std::integral_constant<int, 2>{});
    }
    take(std::integral_constant<int, 1>{});
}

}  // namespace
}  // namespace cortexd
