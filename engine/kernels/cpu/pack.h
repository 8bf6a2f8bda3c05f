// Repacking of plain GGML rows; see packed.h for the result.
#pragma once

#include "packed.h"

namespace cortexd {

// Bytes of the packed matrix, or -1 when the type or the shape has no layout.
int64_t packed_bytes(Type type, int64_t rows, int64_t columns);

// Plain GGML rows, `row_bytes` apart.
struct PlainRows {
    const uint8_t* data;
    int64_t row_bytes;
    int64_t rows;
};

// Repacks the rows of `num_parts` parts, on top of each other, of `columns` elements each, into
// `destination` (64-byte aligned, packed_bytes() of all rows long). False when the type or the shape
// has no layout.
bool pack(Type type, const PlainRows* parts, int64_t num_parts, int64_t columns,
          uint8_t* destination);

}  // namespace cortexd
