// A Gated DeltaNet layer between its input and its output product: a short causal convolution, the
// gated delta rule per value head, a gated norm.
//
// The rule is S <- e^g S;  d = beta (v - S^T k);  S <- S + k d^T;  o = S^T q, with S (key_dim,
// value_dim) in float32, one token after the other in an order that nothing else changes: a prompt at
// once, in any chunks or token by token, alone or in a batch, all give the same bits. The chunked form
// with matrix products would not, and needs as many multiplications as this one, whose columns of S
// stay in the first-level cache from token to token.
#pragma once

#include <cstdint>

#include "attention.h"

namespace cortexd {

constexpr int64_t kMaxDeltaHeadDim = 256;
constexpr int64_t kMaxConvKernel = 8;

struct DeltaNetShape {
    int64_t num_key_heads;
    int64_t num_value_heads;
    int64_t key_dim;      // of a head; a multiple of 16, as value_dim is
    int64_t value_dim;
    int64_t conv_kernel;  // 2 to kMaxConvKernel
    // V head i reads K head i % num_key_heads instead of i / (V heads per K head).
    int32_t has_tiled_heads;
    float norm_eps;

    int64_t key_size() const { return num_key_heads * key_dim; }
    int64_t value_size() const { return num_value_heads * value_dim; }
    int64_t conv_size() const { return 2 * key_size() + value_size(); }
    // Queries, keys, values; the output gate z; b; a: what a token's projections yield.
    int64_t projected_size() const { return conv_size() + value_size() + 2 * num_value_heads; }
};

struct DeltaNetWeights {
    const float* conv;        // (conv_kernel, conv_size)
    const float* decay_rate;  // (num_value_heads,), -e^A_log
    const float* dt_bias;     // (num_value_heads,)
    const float* norm;        // (value_dim,)
};

// One layer's states by slot: S (num_value_heads, key_dim, value_dim), and the last conv_kernel - 1
// inputs of the convolution, (conv_kernel - 1, conv_size).
struct DeltaNetStates {
    float* recurrent;
    float* tails;
};

// A step's sequences: rows, their slots, and whether each begins in this step, whatever its slot holds.
struct DeltaNetRows {
    const SequenceRow* rows;
    const int64_t* state_slots;
    const uint8_t* is_fresh;
    int64_t num_rows;
};

// Advances the states by the rows' tokens. projected (num_tokens, projected_size), dense, is
// overwritten; attended (num_tokens, value_size) gets the rule's outputs.
// Throws std::bad_alloc.
void advance(const DeltaNetShape& shape, const DeltaNetWeights& weights, const DeltaNetRows& rows,
             float* projected, int64_t num_tokens, const DeltaNetStates& states, float* attended);

// One token of `attended`, normed per value head and multiplied by silu(z), in place.
void norm_and_gate(const DeltaNetShape& shape, const DeltaNetWeights& weights,
                   const float* projected, float* attended);

// One head's channels of the convolution over a run of tokens; x is overwritten with silu(y), for
// queries and keys (norm_scale > 0) divided by its length and times norm_scale.
struct ConvRun {
    float* x;
    int64_t stride;  // between tokens
    int64_t num_tokens;
    int64_t size;         // channels, a multiple of 16
    const float* weight;  // (kernel, channels), rows `channels` apart
    float* tail;          // (kernel - 1, channels), likewise
    int64_t channels;
    int64_t kernel;
    bool is_fresh;
    float norm_scale;
};

// One value head's run of tokens, over some columns of its S.
struct DeltaRun {
    const float* query;
    const float* key;
    const float* value;
    int64_t stride;  // between tokens of these three
    float* out;
    int64_t out_stride;
    const float* decay;  // e^g
    const float* beta;
    int64_t gate_stride;
    int64_t num_tokens;
    int64_t key_dim;
    float* state;  // (key_dim, columns), rows `state_stride` apart
    int64_t state_stride;
    bool is_fresh;
    float* scratch;  // key_dim * 32 floats
};

}  // namespace cortexd
