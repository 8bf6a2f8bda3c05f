// Head norms, rotation and the write to the KV cache: what happens between qkv and attention.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention.h"

namespace cortexd {

// Cos and sin of some positions: (num_tokens, rotary_dim / 2) each.
class RotaryTables {
   public:
    // angle = float32(position) * inverse frequency, in float32; cos and sin times `scale`.
    void fill(const int64_t* positions, int64_t num_tokens, const float* inverse_frequencies,
              int64_t half, float scale);
    const float* cos(int64_t token) const { return cos_.data() + token * half_; }
    const float* sin(int64_t token) const { return sin_.data() + token * half_; }
    int64_t half() const { return half_; }

   private:
    std::vector<float> cos_;
    std::vector<float> sin_;
    int64_t half_ = 0;
};

// qkv (num_tokens, num_heads + 2 * num_kv_heads, head_dim), tokens `stride` floats apart: norms the Q and K heads with
// head_norm (num_heads + num_kv_heads, head_dim) unless it is null, rotates them in place, and
// copies K and V to their slots of the cache layer.
void rope_and_kv_write(const AttentionShape& shape, float* qkv, int64_t stride, int64_t num_tokens,
                       const RotaryTables& tables, const float* head_norm, float eps,
                       const int64_t* slots, float* cache_layer);

}  // namespace cortexd
