// One partition of attention for the query heads that share a KV head, for any instruction set.
#pragma once

#include <cstdint>
#include <limits>

#include "attention.h"
#include "elementwise_kernel.h"

namespace cortexd {
namespace {

// Where K of one position and one head lies; V is `value_offset` floats further.
struct KeyPointer {
    const AttentionShape& shape;
    const SequenceRow& row;
    const float* head;  // cache layer + kv_head * head_dim

    int64_t token_stride() const { return 2 * shape.num_kv_heads * shape.head_dim; }
    int64_t value_offset() const { return shape.num_kv_heads * shape.head_dim; }
    const float* at(int64_t position) const {
        const int64_t slot = row.block_ids == nullptr
                                 ? row.first_slot + position
                                 : row.block_ids[position / shape.block_size] * shape.block_size +
                                       position % shape.block_size;
        return head + slot * token_stride();
    }
    // Calls visit(position, K pointer) for begin..end-1, one block's run after the other.
    template <class Visit>
    void for_each(int64_t begin, int64_t end, const Visit& visit) const {
        while (begin < end) {
            int64_t run = end - begin;
            if (row.block_ids != nullptr) {
                const int64_t left = shape.block_size - begin % shape.block_size;
                run = left < run ? left : run;
            }
            const float* key = at(begin);
            for (int64_t i = 0; i < run; ++i, key += token_stride()) visit(begin + i, key);
            begin += run;
        }
    }
};

// A decoding token reads K and V once, from memory: the strides between tokens are too long for the
// hardware to run ahead. K of a few positions ahead is asked for, and V before its own pass.
constexpr int64_t kPrefetchPositions = 8;

template <int64_t HeadDim>
void prefetch_vector(const float* vector) {
    for (int64_t i = 0; i < HeadDim; i += kRows) __builtin_prefetch(vector + i, 0, 2);
}

// Scores become exp(score * scale - largest); returns largest and sum through `tail`.
template <class Isa>
void softmax_numerators(float* scores, int64_t count, float scale, float* tail) {
    const int64_t padded = (count + kRows - 1) / kRows * kRows;
    for (int64_t i = count; i < padded; ++i) scores[i] = -std::numeric_limits<float>::infinity();
    auto largest = Isa::set1(-std::numeric_limits<float>::infinity());
    const auto factor = Isa::set1(scale);
    for (int64_t i = 0; i < padded; i += kRows) {
        const auto scaled = Isa::multiply(Isa::load(scores + i), factor);
        Isa::store(scores + i, scaled);
        largest = Isa::max(largest, scaled);
    }
    tail[0] = Isa::reduce_max(largest);
    const auto shift = Isa::set1(tail[0]);
    auto sum = Isa::zero();
    for (int64_t i = 0; i < padded; i += kRows) {
        const auto value = exponential<Isa>(Isa::subtract(Isa::load(scores + i), shift));
        Isa::store(scores + i, value);
        sum = Isa::add(sum, value);
    }
    tail[1] = Isa::reduce_add(sum);
}

// `Heads` query heads of `Chunks` * 16 dimensions against positions begin..end-1.
template <class Isa, int Chunks, int Heads>
void attend_heads(const KeyPointer& keys, const float* query, int64_t begin, int64_t end,
                  float* partials) {
    using F = typename Isa::F;
    constexpr int64_t kHeadDim = Chunks * kRows;
    alignas(64) float scores[Heads][kPartition];
    const int64_t value_offset = keys.value_offset();
    const int64_t ahead = kPrefetchPositions * keys.token_stride();
    const bool is_decode = keys.row.end - keys.row.start == 1;
    keys.for_each(begin, end, [&](int64_t position, const float* key) {
        if (is_decode) {
            prefetch_vector<kHeadDim>(key + ahead);
            prefetch_vector<kHeadDim>(key + value_offset);
        }
        for (int h = 0; h < Heads; ++h) {
            F sum = Isa::multiply(Isa::load(query + h * kHeadDim), Isa::load(key));
            for (int c = 1; c < Chunks; ++c) {
                sum = Isa::fma(Isa::load(query + h * kHeadDim + c * kRows),
                               Isa::load(key + c * kRows), sum);
            }
            scores[h][position - begin] = Isa::reduce_add(sum);
        }
    });
    F sums[Heads][Chunks];
    for (int h = 0; h < Heads; ++h) {
        float* partial = partials + h * partial_floats(kHeadDim);
        softmax_numerators<Isa>(scores[h], end - begin, keys.shape.scale, partial + kHeadDim);
        for (int c = 0; c < Chunks; ++c) sums[h][c] = Isa::zero();
    }
    keys.for_each(begin, end, [&](int64_t position, const float* key) {
        const float* value = key + value_offset;
        for (int h = 0; h < Heads; ++h) {
            const F weight = Isa::set1(scores[h][position - begin]);
            for (int c = 0; c < Chunks; ++c) {
                sums[h][c] = Isa::fma(weight, Isa::load(value + c * kRows), sums[h][c]);
            }
        }
    });
    for (int h = 0; h < Heads; ++h) {
        for (int c = 0; c < Chunks; ++c) {
            Isa::store(partials + h * partial_floats(kHeadDim) + c * kRows, sums[h][c]);
        }
    }
}

// All heads of a group, as many at a time as the registers hold (K and V are then read once).
template <class Isa, int Chunks, int Heads>
void attend_group(const KeyPointer& keys, const float* query, int64_t heads, int64_t begin,
                  int64_t end, float* partials) {
    constexpr int64_t kHeadDim = Chunks * kRows;
    for (; heads >= Heads; heads -= Heads) {
        attend_heads<Isa, Chunks, Heads>(keys, query, begin, end, partials);
        query += Heads * kHeadDim;
        partials += Heads * partial_floats(kHeadDim);
    }
    if constexpr (Heads > 1) {
        attend_group<Isa, Chunks, Heads - 1>(keys, query, heads, begin, end, partials);
    }
}

// Head sizes in sixteens, and the heads whose sums the registers hold beside one vector.
template <int Chunks, int Heads>
struct HeadSize {
    static constexpr int kChunks = Chunks;
    static constexpr int kHeads = Heads;
};

// Calls `visitor(HeadSize<..>{})`; false when there is no kernel for `head_dim`.
template <class Visitor>
bool visit_head_dim(int64_t head_dim, const Visitor& visitor) {
    switch (head_dim) {
        case 16: visitor(HeadSize<1, 4>{}); return true;
        case 32: visitor(HeadSize<2, 4>{}); return true;
        case 64: visitor(HeadSize<4, 4>{}); return true;
        case 80: visitor(HeadSize<5, 2>{}); return true;
        case 96: visitor(HeadSize<6, 2>{}); return true;
        case 128: visitor(HeadSize<8, 2>{}); return true;
        case 256: visitor(HeadSize<16, 1>{}); return true;
        default: return false;
    }
}

// Partials of the query heads of one token and KV head over positions begin..end-1.
// False when head_dim has no kernel.
template <class Isa>
bool attend_partition(const AttentionShape& shape, const SequenceRow& row,
                      const float* cache_layer, int64_t kv_head, const float* query,
                      int64_t begin, int64_t end, float* partials) {
    const KeyPointer keys{shape, row, cache_layer + kv_head * shape.head_dim};
    const int64_t heads = shape.num_heads / shape.num_kv_heads;
    return visit_head_dim(shape.head_dim, [&](auto size) {
        using Size = decltype(size);
        attend_group<Isa, Size::kChunks, Size::kHeads>(keys, query, heads, begin, end, partials);
    });
}

// Folds `next` (one head, later positions) into `state`.
template <class Isa>
void merge_partial(const float* next, int64_t head_dim, float* state) {
    const float* next_tail = next + head_dim;
    float* tail = state + head_dim;
    const auto old_largest = Isa::set1(tail[0]), new_largest = Isa::set1(next_tail[0]);
    const auto largest = Isa::max(old_largest, new_largest);
    const auto keep = exponential<Isa>(Isa::subtract(old_largest, largest));
    const auto take = exponential<Isa>(Isa::subtract(new_largest, largest));
    for (int64_t i = 0; i < head_dim; i += kRows) {
        const auto added = Isa::multiply(Isa::load(next + i), take);
        Isa::store(state + i, Isa::fma(Isa::load(state + i), keep, added));
    }
    const auto sum = Isa::fma(Isa::set1(tail[1]), keep,
                              Isa::multiply(Isa::set1(next_tail[1]), take));
    float lane[kRows];
    Isa::store(lane, sum);
    tail[1] = lane[0];
    Isa::store(lane, largest);
    tail[0] = lane[0];
}

template <class Isa>
void finish_partial(const float* state, int64_t head_dim, float* out) {
    const auto sum = Isa::set1(state[head_dim + 1]);
    for (int64_t i = 0; i < head_dim; i += kRows) {
        Isa::store(out + i, Isa::divide(Isa::load(state + i), sum));
    }
}

}  // namespace
}  // namespace cortexd
