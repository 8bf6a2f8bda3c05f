// The plain C interface that library.py loads: pointers and sizes, no ownership, no exceptions.
#include <cstdint>

#include "kernels.h"
#include "linear.h"
#include "pack.h"
#include "pool.h"

#define CORTEXD_EXPORT extern "C" __attribute__((visibility("default")))

using namespace cortexd;

CORTEXD_EXPORT const char* cortexd_isa() { return kernels().name; }

CORTEXD_EXPORT int cortexd_force_isa(const char* name) { return force_kernels(name) ? 0 : -1; }

CORTEXD_EXPORT void cortexd_set_num_threads(int count) { set_num_threads(count); }

CORTEXD_EXPORT int cortexd_num_threads() { return num_threads(); }

CORTEXD_EXPORT int64_t cortexd_packed_bytes(int32_t type, int64_t rows, int64_t columns) {
    return packed_bytes(static_cast<Type>(type), rows, columns);
}

CORTEXD_EXPORT int cortexd_pack(int32_t type, const uint8_t* source, int64_t row_bytes,
                                int64_t rows, int64_t columns, uint8_t* destination) {
    return pack(static_cast<Type>(type), source, row_bytes, rows, columns, destination) ? 0 : -1;
}

CORTEXD_EXPORT int cortexd_linear(const Matrix* matrix, const float* x, int64_t num_tokens,
                                  float* y) {
    static thread_local ActivationBuffer buffer;
    if (!buffer.quantize(x, matrix->columns, num_tokens, matrix->columns)) return -1;
    multiply(*matrix, buffer.view(), num_tokens, y, matrix->rows);
    return 0;
}
