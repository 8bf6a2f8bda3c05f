// See delta_net.h. Heads are shared out among the threads: those of the convolution, then blocks of
// columns of the value heads' S, since no column of S looks at another.
#include "delta_net.h"

#include <cmath>
#include <cstddef>
#include <vector>

#include "kernels.h"
#include "linear.h"
#include "pool.h"

namespace cortexd {
namespace {

// Columns of S that one thread takes over a run of tokens: as many as its first-level cache holds.
constexpr int64_t kColumns = 2 * kRows;
// Multiplications that are worth a turn of another thread; see linear.cpp.
constexpr int64_t kMacsPerChunk = 60000;

// e^decay and beta of a step's tokens, (num_tokens, num_value_heads) each.
struct Gates {
    std::vector<float> decay;
    std::vector<float> beta;

    void resize(int64_t count) {
        if (static_cast<int64_t>(beta.size()) >= count) return;
        decay.resize(static_cast<size_t>(count));
        beta.resize(static_cast<size_t>(count));
    }
};

float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

int64_t grain_of(int64_t units, int64_t num_tokens, int64_t macs_per_token) {
    const int64_t macs = num_tokens * macs_per_token / (units > 0 ? units : 1);
    return macs < kMacsPerChunk ? kMacsPerChunk / (macs > 0 ? macs : 1) : 1;
}

class Layer {
   public:
    Layer(const DeltaNetShape& shape, const DeltaNetWeights& weights, const DeltaNetRows& rows,
          float* projected, const DeltaNetStates& states, float* attended, Gates& gates)
        : shape_(shape), weights_(weights), rows_(rows), projected_(projected), states_(states),
          attended_(attended), gates_(gates), columns_(shape.value_dim) {
        for (int64_t i = 0; i < rows.num_rows; ++i) {
            if (rows.rows[i].end - rows.rows[i].start > 1) columns_ = kColumns;
        }
    }

    // Units: for each row its query, key and value heads, and its gates.
    int64_t num_conv_heads() const {
        return 2 * shape_.num_key_heads + shape_.num_value_heads + 1;
    }
    void convolve(int64_t unit) const {
        const int64_t i = unit / num_conv_heads(), head = unit % num_conv_heads();
        if (head == num_conv_heads() - 1) return set_gates(rows_.rows[i]);
        const int64_t num_keys = 2 * shape_.num_key_heads;
        const bool is_value = head >= num_keys;
        const int64_t channel = is_value ? num_keys * shape_.key_dim +
                                               (head - num_keys) * shape_.value_dim
                                         : head * shape_.key_dim;
        float norm_scale = 0.0f;
        if (!is_value) {
            norm_scale = head < shape_.num_key_heads
                             ? 1.0f / std::sqrt(static_cast<float>(shape_.key_dim))
                             : 1.0f;
        }
        const SequenceRow& row = rows_.rows[i];
        ConvRun run;
        run.x = token(row.start) + channel;
        run.stride = shape_.projected_size();
        run.num_tokens = row.end - row.start;
        run.size = is_value ? shape_.value_dim : shape_.key_dim;
        run.weight = weights_.conv + channel;
        run.channels = shape_.conv_size();
        run.kernel = shape_.conv_kernel;
        run.tail = states_.tails + rows_.state_slots[i] * (run.kernel - 1) * run.channels + channel;
        run.is_fresh = rows_.is_fresh[i] != 0;
        run.norm_scale = norm_scale;
        kernels().convolve(run);
    }

    // Units: for each row the blocks of columns of its value heads.
    int64_t blocks_per_head() const { return (shape_.value_dim + columns_ - 1) / columns_; }
    int64_t blocks_per_row() const { return shape_.num_value_heads * blocks_per_head(); }
    void attend(int64_t unit, float* scratch) const {
        const int64_t i = unit / blocks_per_row();
        const int64_t head = unit % blocks_per_row() / blocks_per_head();
        const int64_t column = unit % blocks_per_head() * columns_;
        const int64_t left = shape_.value_dim - column;
        const SequenceRow& row = rows_.rows[i];
        const float* const first = token(row.start);
        const int64_t key_head = key_head_of(head) * shape_.key_dim;
        const int64_t matrix = shape_.key_dim * shape_.value_dim;
        DeltaRun run;
        run.query = first + key_head;
        run.key = first + shape_.key_size() + key_head;
        run.value = first + 2 * shape_.key_size() + head * shape_.value_dim + column;
        run.stride = shape_.projected_size();
        run.out = attended_ + row.start * shape_.value_size() + head * shape_.value_dim + column;
        run.out_stride = shape_.value_size();
        run.decay = gates_.decay.data() + row.start * shape_.num_value_heads + head;
        run.beta = gates_.beta.data() + row.start * shape_.num_value_heads + head;
        run.gate_stride = shape_.num_value_heads;
        run.num_tokens = row.end - row.start;
        run.key_dim = shape_.key_dim;
        run.state = states_.recurrent +
                    (rows_.state_slots[i] * shape_.num_value_heads + head) * matrix + column;
        run.state_stride = shape_.value_dim;
        run.is_fresh = rows_.is_fresh[i] != 0;
        run.scratch = scratch;
        kernels().delta_rule(run, left < columns_ ? left : columns_);
    }

   private:
    float* token(int64_t t) const { return projected_ + t * shape_.projected_size(); }
    int64_t key_head_of(int64_t head) const {
        if (shape_.has_tiled_heads) return head % shape_.num_key_heads;
        return head / (shape_.num_value_heads / shape_.num_key_heads);
    }
    void set_gates(const SequenceRow& row) const {
        const int64_t heads = shape_.num_value_heads;
        for (int64_t t = row.start; t < row.end; ++t) {
            const float* const b = token(t) + shape_.conv_size() + shape_.value_size();
            const float* const a = b + heads;
            for (int64_t h = 0; h < heads; ++h) {
                const auto at = static_cast<size_t>(t * heads + h);
                gates_.beta[at] = 1.0f / (1.0f + std::exp(-b[h]));
                gates_.decay[at] =
                    std::exp(weights_.decay_rate[h] * softplus(a[h] + weights_.dt_bias[h]));
            }
        }
    }

    const DeltaNetShape& shape_;
    const DeltaNetWeights& weights_;
    const DeltaNetRows& rows_;
    float* projected_;
    const DeltaNetStates& states_;
    float* attended_;
    Gates& gates_;
    int64_t columns_;  // of a unit
};

}  // namespace

void advance(const DeltaNetShape& shape, const DeltaNetWeights& weights, const DeltaNetRows& rows,
             float* projected, int64_t num_tokens, const DeltaNetStates& states, float* attended) {
    static thread_local Gates gates;
    gates.resize(num_tokens * shape.num_value_heads);
    const Layer layer(shape, weights, rows, projected, states, attended, gates);
    const int64_t conv_units = rows.num_rows * layer.num_conv_heads();
    const int64_t conv_macs = shape.conv_size() * (shape.conv_kernel + 16);
    parallel_for(conv_units, grain_of(conv_units, num_tokens, conv_macs),
                 [&](int64_t begin, int64_t end) {
                     for (int64_t unit = begin; unit < end; ++unit) layer.convolve(unit);
                 });
    const int64_t units = rows.num_rows * layer.blocks_per_row();
    // Four multiplications per number of S, of which one step of a sequence also waits for memory.
    const int64_t macs = 8 * shape.value_size() * shape.key_dim;
    parallel_for(units, grain_of(units, num_tokens, macs), [&](int64_t begin, int64_t end) {
        alignas(64) float scratch[kMaxDeltaHeadDim * kColumns];
        for (int64_t unit = begin; unit < end; ++unit) layer.attend(unit, scratch);
    });
}

void norm_and_gate(const DeltaNetShape& shape, const DeltaNetWeights& weights,
                   const float* projected, float* attended) {
    const Kernels& set = kernels();
    const float* const gate = projected + shape.conv_size();
    for (int64_t h = 0; h < shape.num_value_heads; ++h) {
        float* const head = attended + h * shape.value_dim;
        set.rms_norm(head, weights.norm, shape.norm_eps, shape.value_dim, head);
        set.silu_mul(gate + h * shape.value_dim, head, shape.value_dim, head);
    }
}

}  // namespace cortexd
