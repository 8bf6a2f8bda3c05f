// See experts.h. The products of all chosen experts are one parallel loop: a single token's would be
// too small to share out one by one.
#include "experts.h"

#include <cmath>
#include <cstddef>

#include "kernels.h"
#include "pool.h"

namespace cortexd {
namespace {

template <class T>
T* grown(std::vector<T>& memory, int64_t count) {
    if (static_cast<int64_t>(memory.size()) < count) memory.resize(static_cast<size_t>(count));
    return memory.data();
}

// Softmax over `logits` in place, then the `count` most probable experts in ascending order. A
// poisoned token gets some experts, and NaN for its weights.
void choose(float* logits, int64_t num_experts, int64_t count, bool normalizes, int64_t* chosen,
            float* factors) {
    float largest = logits[0];
    for (int64_t e = 1; e < num_experts; ++e) largest = logits[e] > largest ? logits[e] : largest;
    float sum = 0.0f;
    for (int64_t e = 0; e < num_experts; ++e) {
        logits[e] = std::exp(logits[e] - largest);
        sum += logits[e];
    }
    float taken = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
        int64_t best = -1;
        for (int64_t e = 0; e < num_experts; ++e) {
            bool is_taken = false;
            for (int64_t j = 0; j < i; ++j) is_taken |= chosen[j] == e;
            if (!is_taken && (best < 0 || logits[e] > logits[best])) best = e;
        }
        int64_t place = i;
        for (; place > 0 && chosen[place - 1] > best; --place) chosen[place] = chosen[place - 1];
        chosen[place] = best;
        taken += logits[best] / sum;
    }
    for (int64_t i = 0; i < count; ++i) {
        const float probability = logits[chosen[i]] / sum;
        factors[i] = normalizes ? probability / taken : probability;
    }
}

}  // namespace

void SparseMlp::route(const SparseWeights& weights, int64_t num_tokens) {
    const int64_t count = weights.num_chosen, stride = weights.entry.rows();
    int64_t* const chosen = grown(chosen_, num_tokens * count);
    float* const factors = grown(factors_, num_tokens * count);
    parallel_for(num_tokens, tokens_per_chunk(weights.num_experts * 32),
                 [&](int64_t begin, int64_t end) {
                     for (int64_t t = begin; t < end; ++t) {
                         choose(entry_.data() + t * stride, weights.num_experts, count,
                                weights.normalizes != 0, chosen + t * count, factors + t * count);
                     }
                 });
}

void SparseMlp::group(const SparseWeights& weights, int64_t num_tokens) {
    const int64_t count = num_tokens * weights.num_chosen;
    first_pair_.assign(static_cast<size_t>(weights.num_experts + 1), 0);
    int64_t* const next = first_pair_.data();
    for (int64_t i = 0; i < count; ++i) ++next[chosen_[static_cast<size_t>(i)] + 1];
    for (int64_t e = 0; e < weights.num_experts; ++e) next[e + 1] += next[e];
    int64_t* const pair_of = grown(pair_of_, count);
    int64_t* const token_of = grown(token_of_, count);
    for (int64_t i = 0; i < count; ++i) {
        pair_of[i] = next[chosen_[static_cast<size_t>(i)]]++;
        token_of[pair_of[i]] = i / weights.num_chosen;
    }
    // Each has moved on to the next one's first.
    for (int64_t e = weights.num_experts; e > 0; --e) next[e] = next[e - 1];
    next[0] = 0;
}

void SparseMlp::add_products(const SparseWeights& weights, std::vector<float>& output,
                             bool is_down) {
    const Activation all = pair_activation_.view();
    for (int64_t e = 0; e < weights.num_experts; ++e) {
        const int64_t first = first_pair_[static_cast<size_t>(e)];
        const int64_t count = first_pair_[static_cast<size_t>(e + 1)] - first;
        if (count == 0) continue;
        const ExpertWeights& expert = weights.experts[e];
        const Projection& projection = is_down ? expert.down : expert.gate_up;
        products_.push_back({&projection, all.from(first, projection.parts[0].columns), count,
                             output.data() + first * projection.rows()});
    }
}

void SparseMlp::add(const SparseWeights& weights, const Activation& x, const float* normed,
                    int64_t num_tokens, int64_t hidden_size, float* hidden) {
    const Kernels& set = kernels();
    const int64_t stride = weights.entry.rows();
    const int64_t pairs = num_tokens * weights.num_chosen;
    float* const entry = grown(entry_, num_tokens * stride);
    multiply(weights.entry, x, num_tokens, entry, false);
    route(weights, num_tokens);
    group(weights, num_tokens);

    const ExpertWeights& any = weights.experts[0];
    const int64_t size = any.down.parts[0].columns;
    float* const gate_up = grown(gate_up_, pairs * 2 * size);
    pair_activation_.prepare(pairs, any.gate_up, [&](int64_t pair) {
        return normed + token_of_[static_cast<size_t>(pair)] * hidden_size;
    });
    products_.clear();
    add_products(weights, gate_up_, false);
    multiply_all(products_);

    grown(down_, pairs * hidden_size);
    pair_activation_.prepare(pairs, any.down, [&](int64_t pair) {
        float* const gate = gate_up + pair * 2 * size;
        set.silu_mul(gate, gate + size, size, gate);
        return gate;
    });
    products_.clear();
    add_products(weights, down_, true);
    const bool has_shared = weights.shared_down.num_parts > 0;
    if (has_shared) {
        const int64_t shared_size = weights.shared_down.parts[0].columns;
        float* const shared = grown(shared_, num_tokens * hidden_size);
        shared_activation_.prepare(num_tokens, weights.shared_down, [&](int64_t t) {
            float* const gate = entry + t * stride + weights.num_experts + 1;
            set.silu_mul(gate, gate + shared_size, shared_size, gate);
            return gate;
        });
        products_.push_back({&weights.shared_down, shared_activation_.view(), num_tokens, shared});
    }
    multiply_all(products_);

    parallel_for(num_tokens, tokens_per_chunk(hidden_size * weights.num_chosen),
                 [&](int64_t begin, int64_t end) {
                     for (int64_t t = begin; t < end; ++t) {
                         float* const sum = hidden + t * hidden_size;
                         for (int64_t i = t * weights.num_chosen; i < (t + 1) * weights.num_chosen; ++i) {
                             const auto at = static_cast<size_t>(i);
                             set.add_scaled(down_.data() + pair_of_[at] * hidden_size, factors_[at],
                                            hidden_size, sum);
                         }
                         if (!has_shared) continue;
                         const float gate = entry[t * stride + weights.num_experts];
                         set.add_scaled(shared_.data() + t * hidden_size,
                                        1.0f / (1.0f + std::exp(-gate)), hidden_size, sum);
                     }
                 });
}

}  // namespace cortexd
