// See rope.h. Tokens are shared out among the threads; each is computed by itself.
#include "rope.h"

#include <cmath>
#include <cstddef>
#include <cstring>

#include "kernels.h"
#include "linear.h"
#include "pool.h"

namespace cortexd {
namespace {

// Cos and sin together take about as long as this many floats of other work.
constexpr int64_t kAngleCost = 32;

}  // namespace

void RotaryTables::fill(const int64_t* positions, int64_t num_tokens,
                        const float* inverse_frequencies, int64_t half, float scale) {
    half_ = half;
    cos_.resize(static_cast<size_t>(num_tokens * half));
    sin_.resize(static_cast<size_t>(num_tokens * half));
    parallel_for(num_tokens, tokens_per_chunk(half * kAngleCost), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * half; i < end * half; ++i) {
            const float angle =
                static_cast<float>(positions[i / half]) * inverse_frequencies[i % half];
            cos_[static_cast<size_t>(i)] = std::cos(angle) * scale;
            sin_[static_cast<size_t>(i)] = std::sin(angle) * scale;
        }
    });
}

void rope_and_kv_write(const AttentionShape& shape, float* qkv, int64_t stride, int64_t num_tokens,
                       const RotaryTables& tables, const float* head_norm, float eps,
                       const int64_t* slots, float* cache_layer) {
    const Kernels& set = kernels();
    const int64_t num_rotated = shape.num_heads + shape.num_kv_heads;
    const int64_t key_value = 2 * shape.num_kv_heads * shape.head_dim;
    parallel_for(num_tokens, tokens_per_chunk(stride), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            float* const heads = qkv + t * stride;
            for (int64_t h = 0; h < num_rotated; ++h) {
                float* const head = heads + h * shape.head_dim;
                if (head_norm != nullptr) {
                    set.rms_norm(head, head_norm + h * shape.head_dim, eps, shape.head_dim, head);
                }
                set.rotate(head, tables.cos(t), tables.sin(t), tables.half());
            }
            std::memcpy(cache_layer + slots[t] * key_value, heads + shape.num_heads * shape.head_dim,
                        static_cast<size_t>(key_value) * sizeof(float));
        }
    });
}

}  // namespace cortexd
