// The plain C interface that library.py loads: pointers and sizes, no ownership, no exceptions.
// Functions that need memory return 0, or -1 when there is none; -2 is a wrong argument.
#include <cstdint>
#include <new>

#include "barrier.h"
#include "decoder.h"
#include "kernels.h"
#include "linear.h"
#include "pack.h"
#include "pool.h"
#include "rope.h"

#define CORTEXD_EXPORT extern "C" __attribute__((visibility("default")))

using namespace cortexd;

namespace {

template <class Function>
int guarded(const Function& function) {
    try {
        function();
        return 0;
    } catch (const std::bad_alloc&) {
        return -1;
    }
}

}  // namespace

CORTEXD_EXPORT const char* cortexd_isa() { return kernels().name; }

CORTEXD_EXPORT int cortexd_force_isa(const char* name) { return force_kernels(name) ? 0 : -1; }

CORTEXD_EXPORT void cortexd_set_num_threads(int count) { set_num_threads(count); }

CORTEXD_EXPORT int cortexd_num_threads() { return num_threads(); }

CORTEXD_EXPORT int64_t cortexd_packed_bytes(int32_t type, int64_t rows, int64_t columns) {
    return packed_bytes(static_cast<Type>(type), rows, columns);
}

CORTEXD_EXPORT int cortexd_pack(int32_t type, const PlainRows* parts, int64_t num_parts,
                                int64_t columns, uint8_t* destination) {
    return pack(static_cast<Type>(type), parts, num_parts, columns, destination) ? 0 : -1;
}

CORTEXD_EXPORT int cortexd_linear(const Matrix* matrix, const float* x, int64_t num_tokens,
                                  float* y) {
    return guarded([&] {
        static thread_local ActivationBuffer buffer;
        const Projection projection{matrix, 1};
        buffer.prepare(num_tokens, projection,
                       [&](int64_t m) { return x + m * matrix->columns; });
        multiply(projection, buffer.view(), num_tokens, y, false);
    });
}

CORTEXD_EXPORT void cortexd_rms_norm(const float* x, const float* weight, float eps,
                                     int64_t num_rows, int64_t size, float* y) {
    parallel_for(num_rows, tokens_per_chunk(size), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            kernels().rms_norm(x + i * size, weight, eps, size, y + i * size);
        }
    });
}

// x (num_rows, 2 * size): gate, up.
CORTEXD_EXPORT void cortexd_silu_mul(const float* x, int64_t num_rows, int64_t size, float* y) {
    parallel_for(num_rows, tokens_per_chunk(size), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            kernels().silu_mul(x + i * 2 * size, x + i * 2 * size + size, size, y + i * size);
        }
    });
}

CORTEXD_EXPORT int cortexd_rope_and_kv_write(const AttentionShape* shape, float* qkv,
                                             int64_t num_tokens, const int64_t* positions,
                                             const float* inverse_frequencies, int64_t half,
                                             float rope_scale, const float* head_norm, float eps,
                                             const int64_t* slots, float* cache_layer) {
    return guarded([&] {
        static thread_local RotaryTables tables;
        tables.fill(positions, num_tokens, inverse_frequencies, half, rope_scale);
        const int64_t row = (shape->num_heads + 2 * shape->num_kv_heads) * shape->head_dim;
        rope_and_kv_write(*shape, qkv, row, num_tokens, tables, head_norm, eps, slots, cache_layer);
    });
}

CORTEXD_EXPORT int cortexd_attend(const AttentionShape* shape, const float* query,
                                  int64_t query_stride, const float* cache_layer,
                                  const SequenceRow* rows, int64_t num_rows, float* out) {
    return guarded(
        [&] { attend(*shape, query, query_stride, cache_layer, rows, num_rows, out); });
}

CORTEXD_EXPORT int cortexd_decoder_step(const DecoderWeights* weights, const DecoderStep* step) {
    if (!is_valid(*weights, *step)) return -2;
    return guarded([&] { run_step(*weights, *step); });
}

CORTEXD_EXPORT int cortexd_barrier(uint32_t* words, int rank, int world_size, uint32_t round,
                                   int num_spins, int64_t timeout_us) {
    return wait_at_barrier(words, rank, world_size, round, num_spins, timeout_us);
}
