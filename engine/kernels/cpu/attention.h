// Causal attention over a paged KV cache.
//
// A layer of the cache is (num_blocks, block_size, 2 * num_kv_heads, head_dim) float32: the K heads
// of a token, then its V heads. Nothing beyond a sequence's own positions is ever read.
//
// A query's positions are taken in partitions of a fixed size, each with its own softmax, merged in
// ascending order. What a query computes therefore depends on its own K and V alone: decoding,
// prefill in one go or in chunks, alone or in a batch, all give the same bits.
#pragma once

#include <cstdint>

namespace cortexd {

constexpr int64_t kPartition = 256;  // positions; their scores of a few heads stay in the L1 cache

struct AttentionShape {
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t head_dim;  // a multiple of 16
    int64_t block_size;
    float scale;
};

// Query tokens start..end-1 of the batch; the last one sees kv_len positions. Position p lies in
// slot block_ids[p / block_size] * block_size + p % block_size, or first_slot + p without a table.
struct SequenceRow {
    int64_t start;
    int64_t end;
    int64_t kv_len;
    int64_t first_slot;
    const int64_t* block_ids;
};

// The softmax state of one head over some positions: numerator (head_dim,), largest score, sum.
// Stored one after the other for the heads that share a KV head.
constexpr int64_t partial_floats(int64_t head_dim) { return head_dim + 16; }

// Some tokens of a sequence that walk its positions together. Token i's query heads of one KV head lie
// at query + i * stride, its partials partials_stride apart; it sees positions before first_visible + i.
constexpr int64_t kQueryTile = 32;
struct QueryTile {
    const float* query;
    int64_t stride;
    int64_t num_tokens;  // at most kQueryTile
    int64_t first_visible;
    int64_t partials_stride;
};

// out (num_tokens, num_heads * head_dim), rows dense; query rows `query_stride` floats apart.
void attend(const AttentionShape& shape, const float* query, int64_t query_stride,
            const float* cache_layer, const SequenceRow* rows, int64_t num_rows, float* out);

}  // namespace cortexd
