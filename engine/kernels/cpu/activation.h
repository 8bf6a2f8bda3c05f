// The right-hand side of packed matrices: quantised to 16 bits, 32 at a time, for quantised weights;
// as they are for dense ones.
#pragma once

#include <cstdint>

namespace cortexd {

// A block's integers go from -kLargest to kLargest: 256 * high + low with two signed bytes, of which
// the high one is never -128.
constexpr float kLargest = 32512.0f;
// Bytes of a block's 32 integers. How they are laid out is the instruction set's own affair.
constexpr int64_t kBlockBytes = 64;

// What a dot product needs to know of one 32-block besides its integers.
struct BlockInfo {
    float scale;       // x is about scale * q; NaN when the block held NaN or infinity
    float scaled_sum;  // scale * (q[0] + .. + q[31]): the factor of a block's minimum
    // -(q[0] + ..), which cancels the offset of stored weights: of all, and of each half.
    int32_t negative_sum;
    int32_t negative_half_sums[2];
};

// `num_tokens` rows of `columns / 32` blocks of kBlockBytes and as many infos, without gaps (null
// when no matrix needs them); and where each token's floats lie.
struct Activation {
    const int8_t* values;
    const BlockInfo* infos;
    const float* const* rows;
};

}  // namespace cortexd
