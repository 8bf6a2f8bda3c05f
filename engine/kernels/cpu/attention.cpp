// Attention over the thread pool: a unit of work is a tile of query tokens and one KV head, or, for
// a decoding token with many positions, one partition of them.
#include "attention.h"

#include <cstddef>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace cortexd {
namespace {

// Multiplications under which another thread is not worth waking.
constexpr int64_t kSmallWork = 40000;

struct Unit {
    const SequenceRow* row;
    int64_t kv_head;
    int64_t token;       // first of the tile
    int64_t num_tokens;
    int64_t partition;   // -1: all
    int64_t partials;    // of a split token: offset in the shared scratch memory
};

class Attention {
   public:
    Attention(const AttentionShape& shape, const float* query, int64_t query_stride,
              const float* cache_layer, float* out)
        : shape_(shape), query_(query), query_stride_(query_stride), cache_layer_(cache_layer),
          out_(out), group_(shape.num_heads / shape.num_kv_heads),
          group_floats_(group_ * partial_floats(shape.head_dim)) {}

    void add(const SequenceRow& row) {
        const int64_t partitions = (row.kv_len + kPartition - 1) / kPartition;
        for (int64_t h = 0; h < shape_.num_kv_heads; ++h) {
            if (row.end - row.start == 1 && partitions > 1) {
                splits_.push_back({&row, h, row.start, 1, -1, split_floats_});
                for (int64_t p = 0; p < partitions; ++p) {
                    units_.push_back({&row, h, row.start, 1, p, split_floats_});
                    split_floats_ += group_floats_;
                }
                continue;
            }
            for (int64_t t = row.start; t < row.end; t += kQueryTile) {
                const int64_t left = row.end - t;
                units_.push_back({&row, h, t, left < kQueryTile ? left : kQueryTile, -1, 0});
            }
        }
        work_ += (row.end - row.start) * row.kv_len * shape_.num_heads * shape_.head_dim;
    }

    void run() {
        if (static_cast<int64_t>(scratch_.size()) < split_floats_) {
            scratch_.resize(static_cast<size_t>(split_floats_));
        }
        const int64_t count = static_cast<int64_t>(units_.size());
        parallel_for(count, work_ < kSmallWork ? count : 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) run_unit(units_[static_cast<size_t>(i)]);
        });
        for (const Unit& unit : splits_) merge_split(unit);
    }

   private:
    // Token t of a row sees the positions before it and its own.
    static int64_t visible(const SequenceRow& row, int64_t token) {
        return row.kv_len - (row.end - 1 - token);
    }
    const float* query_of(int64_t token, int64_t kv_head) const {
        return query_ + token * query_stride_ + kv_head * group_ * shape_.head_dim;
    }
    void partition_of(const Unit& unit, int64_t token, int64_t partition, float* partials) const {
        const int64_t begin = partition * kPartition;
        const int64_t seen = visible(*unit.row, token);
        const int64_t end = seen < begin + kPartition ? seen : begin + kPartition;
        kernels().attend_partition(shape_, *unit.row, cache_layer_, unit.kv_head,
                                   query_of(token, unit.kv_head), begin, end, partials);
    }
    void merge(const float* next, float* state) const {
        for (int64_t h = 0; h < group_; ++h) {
            const int64_t offset = h * partial_floats(shape_.head_dim);
            kernels().merge_partial(next + offset, shape_.head_dim, state + offset);
        }
    }
    void finish(const float* state, int64_t token, int64_t kv_head) const {
        float* out = out_ + (token * shape_.num_heads + kv_head * group_) * shape_.head_dim;
        for (int64_t h = 0; h < group_; ++h) {
            kernels().finish_partial(state + h * partial_floats(shape_.head_dim),
                                     shape_.head_dim, out + h * shape_.head_dim);
        }
    }

    void run_unit(const Unit& unit) const {
        if (unit.partition >= 0) {
            partition_of(unit, unit.token, unit.partition, scratch_.data() + unit.partials);
            return;
        }
        if (unit.num_tokens == 1) {
            run_token(unit);
        } else {
            run_tile(unit);
        }
    }

    void run_token(const Unit& unit) const {
        float* const state = states(2);
        float* const next = state + group_floats_;
        for (int64_t p = 0; p * kPartition < visible(*unit.row, unit.token); ++p) {
            partition_of(unit, unit.token, p, p == 0 ? state : next);
            if (p > 0) merge(next, state);
        }
        finish(state, unit.token, unit.kv_head);
    }

    void run_tile(const Unit& unit) const {
        float* const state = states(2 * kQueryTile);
        float* const next = state + kQueryTile * group_floats_;
        const int64_t first_visible = visible(*unit.row, unit.token);
        const int64_t last_visible = first_visible + unit.num_tokens - 1;
        const QueryTile tile{query_of(unit.token, unit.kv_head), query_stride_, unit.num_tokens,
                             first_visible, group_floats_};
        for (int64_t begin = 0; begin < last_visible; begin += kPartition) {
            const int64_t left = last_visible - begin;
            const int64_t end = begin + (left < kPartition ? left : kPartition);
            kernels().attend_tile(shape_, *unit.row, cache_layer_, unit.kv_head, tile, begin, end,
                                  begin == 0 ? state : next);
            for (int64_t i = 0; i < unit.num_tokens && begin > 0; ++i) {
                if (begin >= first_visible + i) continue;
                merge(next + i * group_floats_, state + i * group_floats_);
            }
        }
        for (int64_t i = 0; i < unit.num_tokens; ++i) {
            finish(state + i * group_floats_, unit.token + i, unit.kv_head);
        }
    }

    // Memory of this thread for as many tokens' partials.
    float* states(int64_t tokens) const {
        static thread_local std::vector<float> memory;
        const auto floats = static_cast<size_t>(tokens * group_floats_);
        if (memory.size() < floats) memory.resize(floats);
        return memory.data();
    }

    void merge_split(const Unit& unit) const {
        float* const state = scratch_.data() + unit.partials;
        for (int64_t p = 1; p * kPartition < unit.row->kv_len; ++p) {
            merge(state + p * group_floats_, state);
        }
        finish(state, unit.token, unit.kv_head);
    }

    const AttentionShape& shape_;
    const float* query_;
    int64_t query_stride_;
    const float* cache_layer_;
    float* out_;
    int64_t group_;
    int64_t group_floats_;  // one token's partials for the heads of one KV head
    int64_t split_floats_ = 0;
    int64_t work_ = 0;
    std::vector<Unit> units_;
    std::vector<Unit> splits_;
    mutable std::vector<float> scratch_;
};

}  // namespace

void attend(const AttentionShape& shape, const float* query, int64_t query_stride,
            const float* cache_layer, const SequenceRow* rows, int64_t num_rows, float* out) {
    Attention attention(shape, query, query_stride, cache_layer, out);
    for (int64_t i = 0; i < num_rows; ++i) attention.add(rows[i]);
    attention.run();
}

}  // namespace cortexd
