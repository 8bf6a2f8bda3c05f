// Whole matrix products over the thread pool.
#pragma once

#include "activation.h"
#include "packed.h"

namespace cortexd {

// Memory for the quantised form of `num_tokens` rows, kept by the calling thread between calls.
class ActivationBuffer {
   public:
    ActivationBuffer() = default;
    ActivationBuffer(const ActivationBuffer&) = delete;
    ActivationBuffer& operator=(const ActivationBuffer&) = delete;
    ~ActivationBuffer();

    // Quantises x (num_tokens, columns), rows `x_stride` floats apart. False: out of memory.
    bool quantize(const float* x, int64_t x_stride, int64_t num_tokens, int64_t columns);
    Activation view() const { return {values_, infos_}; }

   private:
    int8_t* values_ = nullptr;
    BlockInfo* infos_ = nullptr;
    int64_t capacity_ = 0;  // 32-blocks
};

// y (num_tokens, matrix.rows), rows `y_stride` apart, = x . matrix^T + bias.
void multiply(const Matrix& matrix, const Activation& x, int64_t num_tokens, float* y,
              int64_t y_stride);

}  // namespace cortexd
