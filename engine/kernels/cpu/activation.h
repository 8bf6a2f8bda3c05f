// The right-hand side of packed matrices. For quantised weights it is quantised as well, 32 values at
// a time: to 8 bits (fast; adds 0.6 % of error to an output) or to 16 (exact; 0.002 %). For bfloat16
// weights it is rounded to bfloat16 where the CPU multiplies that (fast), else taken as it is.
#pragma once

#include <cstdint>
#include <cstring>

#include "packed.h"

namespace cortexd {

// A block's integers go from -largest to largest. 16 bits are 256 * high + low with two signed
// bytes, of which the high one is never -128.
constexpr float largest_integer(Precision precision) {
    return precision == Precision::kExact ? 32512.0f : 127.0f;
}
// Bytes of a block's 32 integers at most. How they are laid out is the instruction set's own affair.
constexpr int64_t kBlockBytes = 64;

// What a dot product needs to know of one 32-block besides its integers.
struct BlockInfo {
    float scale;       // x is about scale * q; NaN when the block held NaN or infinity
    float scaled_sum;  // scale * (q[0] + .. + q[31]): the factor of a block's minimum
    // -(q[0] + ..), which cancels the offset of stored weights: of all, and of each half.
    int32_t negative_sum;
    int32_t negative_half_sums[2];
};

// The same block of kTileTokens tokens, for products of many tokens: what one instruction takes of
// each of them stands side by side. 8 bits only.
constexpr int64_t kTileTokens = 8;
struct alignas(64) TileBlock {
    int8_t quads[kBlock / 4][kTileTokens][4];
    float scale[kTileTokens];
    int32_t offset[kTileTokens];  // -128 * (q[0] + ..): all stored weights have the offset 128 there
    float scaled_sum[kTileTokens];
    int32_t half_offsets[2][kTileTokens];

    // Takes the block of one token, quantised to 8 bits.
    void set(int64_t token, const int8_t* values, const BlockInfo& info) {
        for (int64_t quad = 0; quad < kBlock / 4; ++quad) {
            std::memcpy(quads[quad][token], values + quad * 4, 4);
        }
        scale[token] = info.scale;
        offset[token] = info.negative_sum * 128;
        scaled_sum[token] = info.scaled_sum;
        half_offsets[0][token] = info.negative_half_sums[0] * 128;
        half_offsets[1][token] = info.negative_half_sums[1] * 128;
    }
};

// `num_tokens` rows of `columns / 32` blocks, kBlockBytes * blocks apart, and as many infos (null when
// no matrix needs them); and where each token's floats lie.
// `tiles`: instead of values and infos (null when not), the blocks of tokens 0..7, of 8..15, ...
// `rounded`: the rows in bfloat16, without gaps (null when no matrix takes them).
struct Activation {
    const int8_t* values;
    const BlockInfo* infos;
    const TileBlock* tiles;
    const float* const* rows;
    const uint16_t* rounded;

    // The same from row `first` on; not of tiles.
    Activation from(int64_t first, int64_t columns) const {
        const int64_t blocks = columns / kBlock;
        return {values + first * blocks * kBlockBytes, infos + first * blocks, nullptr,
                rows + first, rounded + first * columns};
    }
};

}  // namespace cortexd
