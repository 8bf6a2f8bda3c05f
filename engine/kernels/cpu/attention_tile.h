// One partition of attention for several tokens of a sequence at a time, for any instruction set.
//
// The bits are those of attention_kernel.h. K and V of a few positions are copied side by side (in
// the cache a head's positions lie so far apart that they push each other out of the first-level
// cache) and serve all tokens and heads of the tile.
#pragma once

#include <cstdint>
#include <cstring>

#include "attention_kernel.h"

namespace cortexd {
namespace {

// Positions copied at a time: 16 KiB at 128 dimensions.
constexpr int64_t kCopiedPositions = 32;

// `Heads` query heads of `Chunks` * 16 dimensions: one head chunk of a tile.
template <class Isa, int Chunks, int Heads>
struct TileScratch {
    static constexpr int64_t kHeadDim = Chunks * kRows;
    alignas(64) float scores[kQueryTile][Heads][kPartition];
    alignas(64) float vectors[kCopiedPositions][kHeadDim];

    // Copies K (offset 0) or V of the positions from `begin` on, kCopiedPositions or up to `end`, and
    // asks for the next ones. Returns how many.
    int64_t copy(const KeyPointer& keys, int64_t offset, int64_t begin, int64_t end) {
        const int64_t next = end - begin < kCopiedPositions ? end : begin + kCopiedPositions;
        const int64_t after = end - next < kCopiedPositions ? end : next + kCopiedPositions;
        keys.for_each(begin, next, [&](int64_t position, const float* key) {
            std::memcpy(vectors[position - begin], key + offset, sizeof(vectors[0]));
        });
        keys.for_each(next, after, [&](int64_t, const float* key) {
            prefetch_vector<kHeadDim>(key + offset);
        });
        return next - begin;
    }
};

// Scores of `Heads` heads of one token with the first `count` copied vectors, at scores[h][at..].
// Whole steps of positions are computed: vectors beyond `count` are of no consequence.
template <class Isa, int Chunks, int Heads>
void score_copied(const float* query, TileScratch<Isa, Chunks, Heads>& scratch, int64_t token,
                  int64_t at, int64_t count) {
    using F = typename Isa::F;
    constexpr int64_t kHeadDim = Chunks * kRows;
    // As many positions at a time as there are registers for their sums.
    constexpr int kSums = Isa::kScoreSums > Heads ? Isa::kScoreSums : Heads;
    constexpr int kStep = Heads == 3 ? kSums / 4 + (kSums < 4) : kSums / Heads;
    for (int64_t p = 0; p < count; p += kStep) {
        F sums[kSums];
        for (int i = Heads * kStep; i < kSums; ++i) sums[i] = Isa::zero();
#pragma GCC unroll 16
        for (int c = 0; c < Chunks; ++c) {
            F q[Heads];
            for (int h = 0; h < Heads; ++h) q[h] = Isa::load(query + h * kHeadDim + c * kRows);
            for (int i = 0; i < kStep; ++i) {
                F key = Isa::load(scratch.vectors[p + i] + c * kRows);
                Isa::keep(key);
                for (int h = 0; h < Heads; ++h) {
                    F& sum = sums[h * kStep + i];
                    sum = c == 0 ? Isa::multiply(q[h], key) : Isa::fma(q[h], key, sum);
                }
            }
        }
        float reduced[kSums];
        Isa::reduce_each(sums, reduced);
        for (int h = 0; h < Heads; ++h) {
            std::memcpy(scratch.scores[token][h] + at + p, reduced + h * kStep,
                        kStep * sizeof(float));
        }
    }
}

// Adds the first `count` copied vectors, weighted by scores[h][at..], to the numerators.
template <class Isa, int Chunks, int Heads>
void add_copied(const TileScratch<Isa, Chunks, Heads>& scratch, int64_t token, int64_t at,
                int64_t count, float* partials) {
    using F = typename Isa::F;
    constexpr int64_t kStride = partial_floats(Chunks * kRows);
    F sums[Heads][Chunks];
    for (int h = 0; h < Heads; ++h) {
        for (int c = 0; c < Chunks; ++c) {
            sums[h][c] = at == 0 ? Isa::zero() : Isa::load(partials + h * kStride + c * kRows);
        }
    }
    for (int64_t p = 0; p < count; ++p) {
        F weights[Heads];
        for (int h = 0; h < Heads; ++h) weights[h] = Isa::set1(scratch.scores[token][h][at + p]);
        for (int c = 0; c < Chunks; ++c) {
            F value = Isa::load(scratch.vectors[p] + c * kRows);
            Isa::keep(value);
            for (int h = 0; h < Heads; ++h) sums[h][c] = Isa::fma(weights[h], value, sums[h][c]);
        }
    }
    for (int h = 0; h < Heads; ++h) {
        for (int c = 0; c < Chunks; ++c) {
            Isa::store(partials + h * kStride + c * kRows, sums[h][c]);
        }
    }
}

template <class Isa, int Chunks, int Heads>
void attend_tile_heads(const KeyPointer& keys, const QueryTile& tile, int64_t begin, int64_t end,
                       float* partials) {
    static thread_local TileScratch<Isa, Chunks, Heads> scratch;
    constexpr int64_t kHeadDim = Chunks * kRows;
    // How many of `positions` from `from` on a token sees.
    const auto seen = [&](int64_t token, int64_t from, int64_t positions) {
        const int64_t left = tile.first_visible + token - from;
        return left < positions ? left : positions;
    };
    for (int64_t at = begin; at < end; at += kCopiedPositions) {
        const int64_t positions = scratch.copy(keys, 0, at, end);
        for (int64_t t = 0; t < tile.num_tokens; ++t) {
            score_copied(tile.query + t * tile.stride, scratch, t, at - begin,
                         seen(t, at, positions));
        }
    }
    for (int64_t t = 0; t < tile.num_tokens; ++t) {
        const int64_t count = seen(t, begin, end - begin);
        for (int h = 0; h < Heads && count > 0; ++h) {
            float* const tail = partials + t * tile.partials_stride +
                                h * partial_floats(kHeadDim) + kHeadDim;
            softmax_numerators<Isa>(scratch.scores[t][h], count, keys.shape.scale, tail);
        }
    }
    for (int64_t at = begin; at < end; at += kCopiedPositions) {
        const int64_t positions = scratch.copy(keys, keys.value_offset(), at, end);
        for (int64_t t = 0; t < tile.num_tokens; ++t) {
            const int64_t count = seen(t, at, positions);
            if (count <= 0) continue;
            add_copied(scratch, t, at - begin, count, partials + t * tile.partials_stride);
        }
    }
}

// All heads of a group; see attend_group.
template <class Isa, int Chunks, int Heads>
void attend_tile_group(const KeyPointer& keys, QueryTile tile, int64_t heads, int64_t begin,
                       int64_t end, float* partials) {
    constexpr int64_t kHeadDim = Chunks * kRows;
    for (; heads >= Heads; heads -= Heads) {
        attend_tile_heads<Isa, Chunks, Heads>(keys, tile, begin, end, partials);
        tile.query += Heads * kHeadDim;
        partials += Heads * partial_floats(kHeadDim);
    }
    if constexpr (Heads > 1) {
        attend_tile_group<Isa, Chunks, Heads - 1>(keys, tile, heads, begin, end, partials);
    }
}

// Partials of the query heads of a KV head over positions begin..end-1, or as many of them as a token
// sees; those of a token that sees none are left as they are. False when head_dim has no kernel.
template <class Isa>
bool attend_tile(const AttentionShape& shape, const SequenceRow& row, const float* cache_layer,
                 int64_t kv_head, const QueryTile& tile, int64_t begin, int64_t end,
                 float* partials) {
    const KeyPointer keys{shape, row, cache_layer + kv_head * shape.head_dim};
    const int64_t heads = shape.num_heads / shape.num_kv_heads;
    return visit_head_dim(shape.head_dim, [&](auto size) {
        using Size = decltype(size);
        attend_tile_group<Isa, Size::kChunks, Size::kHeads>(keys, tile, heads, begin, end, partials);
    });
}

}  // namespace
}  // namespace cortexd
