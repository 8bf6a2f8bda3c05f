// A whole step of a model in one call: dense, hybrid, with or without experts. The structs are
// mirrored, field by field, in structs.py.
#pragma once

#include <cstdint>

#include "attention.h"
#include "delta_net.h"
#include "experts.h"
#include "linear.h"
#include "packed.h"

namespace cortexd {

struct LayerWeights {
    const float* input_norm;  // (hidden_size,)
    // Attention: Q heads, K heads, V heads, then the gates of Q where there are some. DeltaNet: see
    // delta_net.h.
    Projection input;
    const float* head_norm;  // of attention: (num_heads + num_kv_heads, head_dim), or null
    const DeltaNetWeights* delta_net;  // null: a layer of attention
    Projection output;
    const float* mlp_norm;  // (hidden_size,)
    Projection gate_up;     // gate, up
    Projection down;
    const SparseWeights* experts;  // null: gate_up and down are the feed-forward
};

struct DecoderWeights {
    AttentionShape attention;
    int32_t has_output_gates;  // attention is multiplied by a sigmoid gate per query element
    DeltaNetShape delta_net;   // of a hybrid
    int64_t hidden_size;
    int64_t rotary_half;
    const float* inverse_frequencies;  // (rotary_half,)
    float rope_scale;
    float norm_eps;
    int64_t num_layers;
    const LayerWeights* layers;
    const float* final_norm;
    Projection head;
};

struct DecoderStep {
    int64_t num_tokens;
    float* hidden;  // (num_tokens, hidden_size): embeddings in, residual stream out
    const int64_t* positions;
    const int64_t* slots;
    int64_t num_rows;
    const SequenceRow* rows;
    float* cache;            // of all layers of attention
    int64_t layer_stride;    // floats between the layers of the cache
    int64_t num_slots;       // of one layer
    // Of a hybrid: the state slot of each row, whether it begins in this step, and the states of all
    // layers without attention (see delta_net.h) with the floats between those.
    const int64_t* state_slots;
    const uint8_t* is_fresh;
    float* recurrent;
    int64_t recurrent_stride;
    float* tails;
    int64_t tails_stride;
    int64_t num_state_slots;
    int64_t num_logit_rows;
    const int64_t* logit_rows;
    float* logits;  // (num_logit_rows, vocab_size)
};

// Whether every index of the step lies in its tensor; a wrong one would overwrite foreign memory.
bool is_valid(const DecoderWeights& weights, const DecoderStep& step);

// Throws std::bad_alloc when there is no memory for the step's scratch space.
void run_step(const DecoderWeights& weights, const DecoderStep& step);

}  // namespace cortexd
