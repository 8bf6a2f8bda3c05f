// See decoder.h. Between the matrix products everything is done a token at a time, right before
// the token is made ready for the next product.
#include "decoder.h"

#include <cstddef>
#include <vector>

#include "kernels.h"
#include "rope.h"

namespace cortexd {
namespace {

// Tokens that go through a block of experts together: their pairs with experts take memory.
constexpr int64_t kSparseTokens = 512;

// Scratch memory of the thread that runs steps; grows to the largest step.
struct Scratch {
    ActivationBuffer activation;
    RotaryTables tables;
    SparseMlp sparse;
    std::vector<float> normed;     // one row per token
    std::vector<float> projected;  // the input projection, then gate and up
    std::vector<float> attended;

    static float* grown(std::vector<float>& memory, int64_t floats) {
        if (static_cast<int64_t>(memory.size()) < floats) {
            memory.resize(static_cast<size_t>(floats));
        }
        return memory.data();
    }
};

class Step {
   public:
    Step(const DecoderWeights& weights, const DecoderStep& step, Scratch& scratch)
        : weights_(weights), step_(step), scratch_(scratch), set_(kernels()) {}

    void run() {
        scratch_.tables.fill(step_.positions, step_.num_tokens, weights_.inverse_frequencies,
                             weights_.rotary_half, weights_.rope_scale);
        int64_t num_attention = 0, num_linear = 0;
        for (int64_t i = 0; i < weights_.num_layers; ++i) {
            const LayerWeights& layer = weights_.layers[i];
            if (layer.delta_net != nullptr) {
                delta_net_block(layer, num_linear++);
            } else {
                attention_block(layer, step_.cache + num_attention++ * step_.layer_stride);
            }
            if (layer.experts != nullptr) {
                sparse_block(layer);
            } else {
                mlp_block(layer);
            }
        }
        if (step_.num_logit_rows == 0) return;
        norm_for(weights_.head, weights_.final_norm, step_.num_logit_rows,
                 [&](int64_t i) { return hidden(step_.logit_rows[i]); });
        multiply(weights_.head, scratch_.activation.view(), step_.num_logit_rows, step_.logits,
                 false);
    }

   private:
    float* hidden(int64_t token) const { return step_.hidden + token * weights_.hidden_size; }

    template <class RowOf>
    void norm_for(const Projection& next, const float* norm, int64_t count, const RowOf& row_of) {
        float* const normed = Scratch::grown(scratch_.normed, count * weights_.hidden_size);
        scratch_.activation.prepare(count, next, [&](int64_t i) {
            float* const row = normed + i * weights_.hidden_size;
            set_.rms_norm(row_of(i), norm, weights_.norm_eps, weights_.hidden_size, row);
            return row;
        });
    }

    void attention_block(const LayerWeights& layer, float* cache_layer) {
        const AttentionShape& shape = weights_.attention;
        const int64_t tokens = step_.num_tokens;
        const int64_t qkv_size = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim;
        const int64_t out_size = shape.num_heads * shape.head_dim;
        const bool has_gates = weights_.has_output_gates != 0;
        const int64_t stride = qkv_size + (has_gates ? out_size : 0);
        float* const qkv = Scratch::grown(scratch_.projected, tokens * stride);
        float* const attended = Scratch::grown(scratch_.attended, tokens * out_size);
        norm_for(layer.input, layer.input_norm, tokens, [&](int64_t t) { return hidden(t); });
        multiply(layer.input, scratch_.activation.view(), tokens, qkv, false);
        rope_and_kv_write(shape, qkv, stride, tokens, scratch_.tables, layer.head_norm,
                          weights_.norm_eps, step_.slots, cache_layer);
        attend(shape, qkv, stride, cache_layer, step_.rows, step_.num_rows, attended);
        scratch_.activation.prepare(tokens, layer.output, [&](int64_t t) {
            float* const row = attended + t * out_size;
            if (has_gates) set_.sigmoid_mul(qkv + t * stride + qkv_size, row, out_size, row);
            return row;
        });
        multiply(layer.output, scratch_.activation.view(), tokens, step_.hidden, true);
    }

    void delta_net_block(const LayerWeights& layer, int64_t index) {
        const DeltaNetShape& shape = weights_.delta_net;
        const int64_t tokens = step_.num_tokens;
        const int64_t stride = shape.projected_size(), out_size = shape.value_size();
        float* const projected = Scratch::grown(scratch_.projected, tokens * stride);
        float* const attended = Scratch::grown(scratch_.attended, tokens * out_size);
        norm_for(layer.input, layer.input_norm, tokens, [&](int64_t t) { return hidden(t); });
        multiply(layer.input, scratch_.activation.view(), tokens, projected, false);
        const DeltaNetRows rows{step_.rows, step_.state_slots, step_.is_fresh, step_.num_rows};
        const DeltaNetStates states{step_.recurrent + index * step_.recurrent_stride,
                                    step_.tails + index * step_.tails_stride};
        advance(shape, *layer.delta_net, rows, projected, tokens, states, attended);
        scratch_.activation.prepare(tokens, layer.output, [&](int64_t t) {
            float* const row = attended + t * out_size;
            norm_and_gate(shape, *layer.delta_net, projected + t * stride, row);
            return row;
        });
        multiply(layer.output, scratch_.activation.view(), tokens, step_.hidden, true);
    }

    void sparse_block(const LayerWeights& layer) {
        const int64_t size = weights_.hidden_size;
        for (int64_t first = 0; first < step_.num_tokens; first += kSparseTokens) {
            const int64_t left = step_.num_tokens - first;
            const int64_t tokens = left < kSparseTokens ? left : kSparseTokens;
            norm_for(layer.experts->entry, layer.mlp_norm, tokens,
                     [&](int64_t t) { return hidden(first + t); });
            scratch_.sparse.add(*layer.experts, scratch_.activation.view(), scratch_.normed.data(),
                                tokens, size, hidden(first));
        }
    }

    void mlp_block(const LayerWeights& layer) {
        const int64_t tokens = step_.num_tokens;
        const int64_t size = layer.down.parts[0].columns;
        float* const gate_up = Scratch::grown(scratch_.projected, tokens * 2 * size);
        norm_for(layer.gate_up, layer.mlp_norm, tokens, [&](int64_t t) { return hidden(t); });
        multiply(layer.gate_up, scratch_.activation.view(), tokens, gate_up, false);
        scratch_.activation.prepare(tokens, layer.down, [&](int64_t t) {
            float* const gate = gate_up + t * 2 * size;
            set_.silu_mul(gate, gate + size, size, gate);
            return gate;
        });
        multiply(layer.down, scratch_.activation.view(), tokens, step_.hidden, true);
    }

    const DecoderWeights& weights_;
    const DecoderStep& step_;
    Scratch& scratch_;
    const Kernels& set_;
};

bool all_within(const int64_t* values, int64_t count, int64_t limit) {
    for (int64_t i = 0; i < count; ++i) {
        if (values[i] < 0 || values[i] >= limit) return false;
    }
    return true;
}

bool is_row_valid(const SequenceRow& row, const DecoderStep& step, int64_t block_size) {
    const bool has_tokens = row.start >= 0 && row.start < row.end && row.end <= step.num_tokens;
    if (!has_tokens || row.kv_len < row.end - row.start) return false;
    if (row.block_ids == nullptr) {
        return row.first_slot >= 0 && row.first_slot + row.kv_len <= step.num_slots;
    }
    const int64_t blocks = (row.kv_len + block_size - 1) / block_size;
    return all_within(row.block_ids, blocks, step.num_slots / block_size);
}

}  // namespace

bool is_valid(const DecoderWeights& weights, const DecoderStep& step) {
    for (int64_t i = 0; i < step.num_rows; ++i) {
        if (!is_row_valid(step.rows[i], step, weights.attention.block_size)) return false;
    }
    if (step.recurrent != nullptr &&
        !all_within(step.state_slots, step.num_rows, step.num_state_slots)) {
        return false;
    }
    return all_within(step.slots, step.num_tokens, step.num_slots) &&
           all_within(step.logit_rows, step.num_logit_rows, step.num_tokens);
}

void run_step(const DecoderWeights& weights, const DecoderStep& step) {
    static thread_local Scratch scratch;
    Step(weights, step, scratch).run();
}

}  // namespace cortexd
