// What one instruction set provides; chosen once at run time by dispatch.cpp.
#pragma once

#include <cstdint>

#include "activation.h"
#include "attention.h"
#include "delta_net.h"
#include "packed.h"

namespace cortexd {

struct Kernels {
    const char* name;
    // Quantises `blocks` 32-blocks that follow one another in `x`; see activation.h.
    void (*quantize)(const float* x, int64_t blocks, Precision precision, int8_t* values,
                     BlockInfo* infos);
    // y[m][r] = [y[m][r] +] (matrix row r . x[m] + bias[r]) for the 16-row groups [begin, end) and all tokens;
    // y rows are `y_stride` floats apart.
    void (*multiply_groups)(const Matrix& matrix, const Activation& x, int64_t num_tokens,
                            int64_t begin, int64_t end, float* y, int64_t y_stride,
                            bool accumulate);
    // The same with 8-bit activations in tiles (x.tiles), for many tokens. Null where the instruction
    // set has none. The bits are those of multiply_groups.
    void (*multiply_tiles)(const Matrix& matrix, const Activation& x, int64_t num_tokens,
                           int64_t begin, int64_t end, float* y, int64_t y_stride,
                           bool accumulate);
    // The fast products of bfloat16 rows: x (num_tokens, columns), rounded to bfloat16. Null where
    // the instruction set has none; the products are then as exact as multiply_groups.
    void (*round_row)(const float* x, int64_t columns, uint16_t* rounded);
    void (*multiply_rounded_groups)(const Matrix& matrix, const uint16_t* x, int64_t num_tokens,
                                    int64_t begin, int64_t end, float* y, int64_t y_stride,
                                    bool accumulate);
    // One token; see elementwise_kernel.h.
    void (*rms_norm)(const float* x, const float* weight, float eps, int64_t size, float* y);
    void (*silu_mul)(const float* gate, const float* up, int64_t size, float* out);
    void (*sigmoid_mul)(const float* gate, const float* x, int64_t size, float* out);
    void (*add_scaled)(const float* x, float factor, int64_t size, float* y);
    void (*rotate)(float* head, const float* cos, const float* sin, int64_t half);
    // See attention_kernel.h.
    bool (*attend_partition)(const AttentionShape& shape, const SequenceRow& row,
                             const float* cache_layer, int64_t kv_head, const float* query,
                             int64_t begin, int64_t end, float* partials);
    // The same for a tile of tokens; see attention_tile.h.
    bool (*attend_tile)(const AttentionShape& shape, const SequenceRow& row,
                        const float* cache_layer, int64_t kv_head, const QueryTile& tile,
                        int64_t begin, int64_t end, float* partials);
    void (*merge_partial)(const float* next, int64_t head_dim, float* state);
    void (*finish_partial)(const float* state, int64_t head_dim, float* out);
    // See delta_net_kernel.h.
    void (*convolve)(const ConvRun& run);
    void (*delta_rule)(DeltaRun run, int64_t columns);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
// `base` with products of tiles.
Kernels with_tiles(const Kernels& base);
// `base` with fast products of bfloat16 rows.
Kernels with_bf16(const Kernels& base);
#endif

// The active set: the best of this CPU unless one was forced.
const Kernels& kernels();
// Forces a set by name ("portable", "avx2", "avx512", "avx512bf16"); false when this CPU or build lacks it.
bool force_kernels(const char* name);

}  // namespace cortexd
