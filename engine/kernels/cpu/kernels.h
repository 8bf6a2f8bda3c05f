// What one instruction set provides; chosen once at run time by dispatch.cpp.
#pragma once

#include <cstdint>

#include "activation.h"
#include "packed.h"

namespace cortexd {

struct Kernels {
    const char* name;
    // Quantises `blocks` 32-blocks that follow one another in `x`.
    void (*quantize)(const float* x, int64_t blocks, int8_t* values, BlockInfo* infos);
    // y[m][r] = matrix row r . x[m] + bias[r] for the 16-row groups [begin, end) and all tokens;
    // y rows are `y_stride` floats apart.
    void (*multiply_groups)(const Matrix& matrix, const Activation& x, int64_t num_tokens,
                            int64_t begin, int64_t end, float* y, int64_t y_stride);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// The active set: the best of this CPU unless one was forced.
const Kernels& kernels();
// Forces a set by name ("portable", "avx2", "avx512"); false when this CPU or build lacks it.
bool force_kernels(const char* name);

}  // namespace cortexd
