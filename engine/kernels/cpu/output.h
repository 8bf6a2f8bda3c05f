// Where a product's sums go.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace cortexd {
namespace {

// Rows of outputs, one per token; `accumulate`: add to what is there.
struct Destination {
    float* y;
    int64_t stride;
    bool accumulate;
};

// What becomes of a finished sum of one group: bias (or null), number of real rows, destination.
struct Output {
    const float* bias;
    int64_t rows;
    float* y;
    int64_t stride;
    bool accumulate;

    Output(const Matrix& matrix, int64_t group, const Destination& to)
        : bias(matrix.bias == nullptr ? nullptr : matrix.bias + group * kRows),
          rows(matrix.rows - group * kRows < kRows ? matrix.rows - group * kRows : kRows),
          y(to.y + group * kRows), stride(to.stride), accumulate(to.accumulate) {}

    template <class Isa>
    void store(typename Isa::F sum, int64_t token) const {
        float* to = y + token * stride;
        if (rows == kRows) {
            if (bias != nullptr) sum = Isa::add(sum, Isa::load(bias));
            Isa::store(to, accumulate ? Isa::add(Isa::load(to), sum) : sum);
            return;
        }
        float lane[kRows];
        Isa::store(lane, sum);
        for (int64_t r = 0; r < rows; ++r) {
            const float value = bias == nullptr ? lane[r] : lane[r] + bias[r];
            to[r] = accumulate ? to[r] + value : value;
        }
    }
};

}  // namespace
}  // namespace cortexd
