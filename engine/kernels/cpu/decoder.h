// A whole step of a llama- or qwen3-shaped model in one call. The structs are mirrored, field by
// field, in decoder.py.
#pragma once

#include <cstdint>

#include "attention.h"
#include "linear.h"
#include "packed.h"

namespace cortexd {

struct LayerWeights {
    const float* input_norm;  // (hidden_size,)
    Projection qkv;           // Q heads, K heads, V heads
    const float* head_norm;   // (num_heads + num_kv_heads, head_dim), or null
    Projection output;
    const float* mlp_norm;  // (hidden_size,)
    Projection gate_up;     // gate, up
    Projection down;
};

struct DecoderWeights {
    AttentionShape attention;
    int64_t hidden_size;
    int64_t intermediate_size;
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
    float* cache;            // of all layers
    int64_t layer_stride;    // floats between the layers of the cache
    int64_t num_slots;       // of one layer
    int64_t num_logit_rows;
    const int64_t* logit_rows;
    float* logits;  // (num_logit_rows, vocab_size)
};

// Whether every index of the step lies in its tensor; a wrong one would overwrite foreign memory.
bool is_valid(const DecoderWeights& weights, const DecoderStep& step);

// Throws std::bad_alloc when there is no memory for the step's scratch space.
void run_step(const DecoderWeights& weights, const DecoderStep& step);

}  // namespace cortexd
