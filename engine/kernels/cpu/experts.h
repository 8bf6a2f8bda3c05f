// A mixture of experts: a router sends each token through a few of many gated feed-forwards, and,
// where there is one, through a shared expert that has a gate of its own.
//
// A token's experts are added up in ascending order and each computes it by itself, so a token's
// result has the same bits in any batch.
#pragma once

#include <cstdint>
#include <vector>

#include "linear.h"

namespace cortexd {

struct ExpertWeights {
    Projection gate_up;
    Projection down;
};

struct SparseWeights {
    // Router (num_experts rows); then, with a shared expert, its gate (one row), its gate and up.
    Projection entry;
    const ExpertWeights* experts;  // of the same types and sizes
    Projection shared_down;        // no parts: there is no shared expert
    int64_t num_experts;
    int64_t num_chosen;
    int32_t normalizes;  // whether the weights of a token's experts add up to 1
};

// The memory of one such block; kept between uses.
class SparseMlp {
   public:
    // hidden (num_tokens, hidden_size) += the block's result; `x` is `normed` as `entry` needs it.
    // Throws std::bad_alloc.
    void add(const SparseWeights& weights, const Activation& x, const float* normed,
             int64_t num_tokens, int64_t hidden_size, float* hidden);

   private:
    void route(const SparseWeights& weights, int64_t num_tokens);
    void group(const SparseWeights& weights, int64_t num_tokens);
    // Appends each expert's product of its pairs to `products_`.
    void add_products(const SparseWeights& weights, std::vector<float>& output, bool is_down);

    ActivationBuffer pair_activation_{true};  // each expert takes its own part
    ActivationBuffer shared_activation_;
    std::vector<Product> products_;
    std::vector<float> entry_;          // (num_tokens, entry rows)
    std::vector<float> gate_up_;        // one row per pair of a token and its expert
    std::vector<float> down_;
    std::vector<float> shared_;         // (num_tokens, hidden_size)
    std::vector<float> factors_;        // (num_tokens, num_chosen)
    std::vector<int64_t> chosen_;       // (num_tokens, num_chosen): experts, ascending
    std::vector<int64_t> pair_of_;      // (num_tokens, num_chosen): rows of the pairs
    std::vector<int64_t> token_of_;     // of each pair; pairs stand expert by expert
    std::vector<int64_t> first_pair_;   // of each expert, and the end
};

}  // namespace cortexd
