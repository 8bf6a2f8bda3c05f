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

// Asks for the places of the sums of some groups and tokens, to be called before these are computed:
// of many tokens they are not in the cache, and waiting for them took 5 % of the products.
inline void prefetch_outputs(const Destination& to, int64_t group, int64_t num_groups,
                             int64_t token, int64_t num_tokens) {
    for (int64_t m = token; m < token + num_tokens; ++m) {
        const float* const row = to.y + m * to.stride + group * kRows;
        for (int64_t i = 0; i < num_groups; ++i) __builtin_prefetch(row + i * kRows, 1, 3);
    }
}

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
