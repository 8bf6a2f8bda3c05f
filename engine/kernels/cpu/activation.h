// Activations quantised to int8, 32 at a time: the right-hand side of every packed matrix.
#pragma once

#include <cstdint>

namespace cortexd {

// What a dot product needs to know of one 32-block besides its integers.
struct BlockInfo {
    float scale;       // x is about scale * q; NaN when the block held NaN or infinity
    float scaled_sum;  // scale * (q[0] + .. + q[31]): the factor of a block's minimum
    int32_t negative_sum_low;   // -(q[0] + .. + q[15]): cancels the offset of stored weights
    int32_t negative_sum_high;  // -(q[16] + .. + q[31])
};

// `num_tokens` rows of `columns` int8 and `columns / 32` infos, both dense.
struct Activation {
    const int8_t* values;
    const BlockInfo* infos;
};

}  // namespace cortexd
