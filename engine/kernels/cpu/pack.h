// Repacking of plain GGML rows; see packed.h for the result.
#pragma once

#include "packed.h"

namespace cortexd {

// Bytes of the packed matrix, or -1 when the type or the shape has no layout.
int64_t packed_bytes(Type type, int64_t rows, int64_t columns);

// Repacks `rows` GGML rows of `columns` elements, `row_bytes` apart, into `destination` (64-byte
// aligned, packed_bytes() long). False when the type or the shape has no layout.
bool pack(Type type, const uint8_t* source, int64_t row_bytes, int64_t rows, int64_t columns,
          uint8_t* destination);

}  // namespace cortexd
