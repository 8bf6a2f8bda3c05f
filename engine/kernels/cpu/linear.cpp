// Matrix products: rows of tokens are quantised once, then groups of 16 weight rows are shared
// out among the threads.
#include "linear.h"

#include <cstdlib>

#include "kernels.h"
#include "pool.h"

namespace cortexd {
namespace {

// A chunk should be at least some microseconds of work, or claiming it costs more than it gives.
constexpr int64_t kMacsPerChunk = 60000;
constexpr int64_t kFloatsPerChunk = 16384;

int64_t at_least_one(int64_t value) { return value < 1 ? 1 : value; }

}  // namespace

ActivationBuffer::~ActivationBuffer() {
    std::free(values_);
    std::free(infos_);
}

bool ActivationBuffer::quantize(const float* x, int64_t x_stride, int64_t num_tokens,
                                int64_t columns) {
    const int64_t blocks = columns / kBlock;
    const int64_t needed = num_tokens * blocks;
    if (needed > capacity_) {
        std::free(values_);
        std::free(infos_);
        values_ = static_cast<int8_t*>(
            std::aligned_alloc(64, static_cast<size_t>((needed * kBlock + 63) / 64 * 64)));
        infos_ = static_cast<BlockInfo*>(std::aligned_alloc(
            64, (static_cast<size_t>(needed) * sizeof(BlockInfo) + 63) / 64 * 64));
        capacity_ = values_ != nullptr && infos_ != nullptr ? needed : 0;
        if (capacity_ == 0) return false;
    }
    const Kernels& set = kernels();
    parallel_for(num_tokens, at_least_one(kFloatsPerChunk / columns),
                 [&](int64_t begin, int64_t end) {
                     for (int64_t m = begin; m < end; ++m) {
                         set.quantize(x + m * x_stride, blocks, values_ + m * columns,
                                      infos_ + m * blocks);
                     }
                 });
    return true;
}

void multiply(const Matrix& matrix, const Activation& x, int64_t num_tokens, float* y,
              int64_t y_stride) {
    const Kernels& set = kernels();
    const int64_t groups = (matrix.rows + kRows - 1) / kRows;
    const int64_t macs_per_group = kRows * matrix.columns * num_tokens;
    parallel_for(groups, at_least_one(kMacsPerChunk / macs_per_group),
                 [&](int64_t begin, int64_t end) {
                     set.multiply_groups(matrix, x, num_tokens, begin, end, y, y_stride);
                 });
}

}  // namespace cortexd
