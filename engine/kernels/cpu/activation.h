// The right-hand side of packed matrices. For quantised weights it is quantised as well, 32 values at
// a time: to 8 bits (fast; adds 0.6 % of error to an output) or to 16 (exact; 0.002 %). For bfloat16
// weights it is rounded to bfloat16 where the CPU multiplies that (fast), else taken as it is.
#pragma once

#include <cstdint>

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

// `num_tokens` rows of `columns / 32` blocks, kBlockBytes * blocks apart, and as many infos (null when
// no matrix needs them); and where each token's floats lie.
// `rounded`: the rows in bfloat16, without gaps (null when no matrix takes them).
struct Activation {
    const int8_t* values;
    const BlockInfo* infos;
    const float* const* rows;
    const uint16_t* rounded;

    // The same from row `first` on.
    Activation from(int64_t first, int64_t columns) const {
        const int64_t blocks = columns / kBlock;
        return {values + first * blocks * kBlockBytes, infos + first * blocks, rows + first,
                rounded + first * columns};
    }
};

}  // namespace cortexd
