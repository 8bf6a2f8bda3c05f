// Matrix products: groups of 16 weight rows of all parts are shared out among the threads.
#include "linear.h"

namespace cortexd {
namespace {

// See kFloatsPerChunk.
constexpr int64_t kMacsPerChunk = 60000;

// Dense kernels take this many groups side by side (see Isa::kDenseGroups); and with many tokens,
// which come from the second-level cache, a pass over them serves as many groups.
constexpr int64_t kGroupStep = 4;
constexpr int64_t kManyTokens = 32;

int64_t num_groups(const Matrix& matrix) { return (matrix.rows + kRows - 1) / kRows; }

// The part of [begin, end) that lies in [first, first + count), relative to first.
struct Overlap {
    int64_t begin;
    int64_t end;

    Overlap(int64_t from, int64_t to, int64_t first, int64_t count)
        : begin(from > first ? from - first : 0), end(to - first < count ? to - first : count) {}
};

int64_t num_groups(const Projection& projection) {
    int64_t groups = 0;
    for (int64_t i = 0; i < projection.num_parts; ++i) groups += num_groups(projection.parts[i]);
    return groups;
}

// Groups that one thread takes at a time.
int64_t grain_of(const Projection& projection, int64_t num_tokens) {
    const int64_t macs_per_group = kRows * projection.parts[0].columns * num_tokens;
    const int64_t grain = macs_per_group < kMacsPerChunk ? kMacsPerChunk / macs_per_group : 1;
    if (!projection.has_dense_part() && num_tokens <= kManyTokens) return grain;
    return (grain + kGroupStep - 1) / kGroupStep * kGroupStep;
}

// The groups [begin, end), counted over all parts.
void multiply_range(const Projection& projection, const Activation& x, int64_t num_tokens,
                    int64_t begin, int64_t end, float* y, bool accumulate) {
    const Kernels& set = kernels();
    const int64_t y_stride = projection.rows();
    int64_t first = 0, column = 0;
    for (int64_t i = 0; i < projection.num_parts; ++i) {
        const Matrix& matrix = projection.parts[i];
        const Overlap range(begin, end, first, num_groups(matrix));
        if (range.begin < range.end && is_rounded(matrix)) {
            set.multiply_rounded_groups(matrix, x.rounded, num_tokens, range.begin, range.end,
                                        y + column, y_stride, accumulate);
        } else if (range.begin < range.end && x.tiles != nullptr && !is_dense(matrix.type)) {
            set.multiply_tiles(matrix, x, num_tokens, range.begin, range.end, y + column,
                               y_stride, accumulate);
        } else if (range.begin < range.end) {
            set.multiply_groups(matrix, x, num_tokens, range.begin, range.end, y + column,
                                y_stride, accumulate);
        }
        first += num_groups(matrix);
        column += matrix.rows;
    }
}

// Groups of one of several products.
struct Share {
    const Product* product;
    int64_t begin;
    int64_t end;
};

}  // namespace

void multiply(const Projection& projection, const Activation& x, int64_t num_tokens, float* y,
              bool accumulate) {
    parallel_for(num_groups(projection), grain_of(projection, num_tokens),
                 [&](int64_t begin, int64_t end) {
                     multiply_range(projection, x, num_tokens, begin, end, y, accumulate);
                 });
}

void multiply_all(const std::vector<Product>& products) {
    static thread_local std::vector<Share> kept;
    std::vector<Share>& shares = kept;  // the other threads have vectors of their own
    shares.clear();
    for (const Product& product : products) {
        const int64_t groups = num_groups(*product.projection);
        const int64_t grain = grain_of(*product.projection, product.num_tokens);
        for (int64_t begin = 0; begin < groups; begin += grain) {
            shares.push_back({&product, begin, begin + grain < groups ? begin + grain : groups});
        }
    }
    parallel_for(static_cast<int64_t>(shares.size()), 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const Share& share = shares[static_cast<size_t>(i)];
            const Product& product = *share.product;
            multiply_range(*product.projection, product.x, product.num_tokens, share.begin,
                           share.end, product.y, false);
        }
    });
}

}  // namespace cortexd
