// Whole matrix products over the thread pool.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "activation.h"
#include "kernels.h"
#include "packed.h"
#include "pool.h"

namespace cortexd {

// A chunk should be at least some microseconds of work, or claiming it costs more than it gives.
constexpr int64_t kFloatsPerChunk = 16384;

inline int64_t tokens_per_chunk(int64_t columns) {
    return columns < kFloatsPerChunk ? kFloatsPerChunk / columns : 1;
}

// The quantised form of some rows of tokens; its memory is kept between uses.
class ActivationBuffer {
   public:
    // Quantises num_tokens rows of `columns` floats; row_of(token) returns a token's row and is
    // called once per token, on the thread that quantises it.
    template <class RowOf>
    void quantize(int64_t num_tokens, int64_t columns, const RowOf& row_of) {
        const int64_t blocks = columns / kBlock;
        grow(num_tokens * blocks);
        const Kernels& set = kernels();
        parallel_for(num_tokens, tokens_per_chunk(columns), [&](int64_t begin, int64_t end) {
            for (int64_t m = begin; m < end; ++m) {
                set.quantize(row_of(m), blocks, values_.data() + m * blocks * kBlockBytes,
                             infos_.data() + m * blocks);
            }
        });
    }
    Activation view() const { return {values_.data(), infos_.data()}; }

   private:
    void grow(int64_t blocks) {
        if (static_cast<size_t>(blocks) <= infos_.size()) return;
        values_.resize(static_cast<size_t>(blocks * kBlockBytes));
        infos_.resize(static_cast<size_t>(blocks));
    }

    std::vector<int8_t> values_;
    std::vector<BlockInfo> infos_;
};

// Matrices of equal width whose outputs stand side by side.
struct Projection {
    const Matrix* parts;
    int64_t num_parts;

    int64_t rows() const {
        int64_t sum = 0;
        for (int64_t i = 0; i < num_parts; ++i) sum += parts[i].rows;
        return sum;
    }
};

// y (num_tokens, projection.rows()), dense, = [y +] x . matrix^T + bias.
void multiply(const Projection& projection, const Activation& x, int64_t num_tokens, float* y,
              bool accumulate);

}  // namespace cortexd
