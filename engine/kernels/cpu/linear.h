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

// Whether the matrix is multiplied with activations rounded to bfloat16.
inline bool is_rounded(const Matrix& matrix) {
    return matrix.type == Type::BF16 && matrix.precision == Precision::kFast &&
           kernels().round_row != nullptr;
}

// Matrices of equal width whose outputs stand side by side.
struct Projection {
    const Matrix* parts;
    int64_t num_parts;

    int64_t rows() const {
        int64_t sum = 0;
        for (int64_t i = 0; i < num_parts; ++i) sum += parts[i].rows;
        return sum;
    }
    // Whether its quantised parts have products of tiles.
    bool has_tiles() const {
        return has_quantized_part() && parts[0].precision == Precision::kFast &&
               kernels().multiply_tiles != nullptr;
    }
    bool has_part(bool dense) const {
        for (int64_t i = 0; i < num_parts; ++i) {
            if (is_dense(parts[i].type) == dense) return true;
        }
        return false;
    }
    bool has_quantized_part() const { return has_part(false); }
    // Whether a part takes rows rounded to bfloat16.
    bool has_rounded_part() const {
        for (int64_t i = 0; i < num_parts; ++i) {
            if (is_rounded(parts[i])) return true;
        }
        return false;
    }
    bool has_dense_part() const { return has_part(true); }
};

// Some rows of tokens as a projection needs them; its memory is kept between uses.
class ActivationBuffer {
   public:
    // From here on it pays to unpack a panel of weights for all tokens: at 512, 3 % for Q4_0 and Q8_0,
    // 9 % for Q4_K, 13 % for Q5_K, 16 % for Q6_K; at 128 it costs 3 % of Q4_0 and Q8_0.
    static constexpr int64_t kManyTokens = 192;

    // Tiles cannot be taken apart; a `takes_parts` buffer never makes any.
    explicit ActivationBuffer(bool takes_parts = false) : takes_parts_(takes_parts) {}

    // row_of(token) makes and returns a token's row of floats, which must stay as it is until the
    // product is done; it is called once per token, on the thread that quantises it.
    template <class RowOf>
    void prepare(int64_t num_tokens, const Projection& projection, const RowOf& row_of) {
        const int64_t columns = projection.parts[0].columns;
        const int64_t blocks = columns / kBlock;
        const bool is_quantized = projection.has_quantized_part();
        const Precision precision = projection.parts[0].precision;
        const bool has_rounded = projection.has_rounded_part();
        const Kernels& set = kernels();
        is_tiled_ = !takes_parts_ && num_tokens >= kManyTokens && projection.has_tiles();
        grow(num_tokens, is_quantized ? blocks : 0);
        if (has_rounded && static_cast<size_t>(num_tokens * columns) > rounded_.size()) {
            rounded_.resize(static_cast<size_t>(num_tokens * columns));
        }
        parallel_for(num_tokens, tokens_per_chunk(columns), [&](int64_t begin, int64_t end) {
            for (int64_t m = begin; m < end; ++m) {
                const float* const row = row_of(m);
                rows_[static_cast<size_t>(m)] = row;
                if (has_rounded) set.round_row(row, columns, rounded_.data() + m * columns);
                if (!is_quantized) continue;
                if (is_tiled_) {
                    quantize_to_tile(set, row, blocks, m);
                    continue;
                }
                set.quantize(row, blocks, precision, values_.data() + m * blocks * kBlockBytes,
                             infos_.data() + m * blocks);
            }
        });
    }
    Activation view() const {
        return {values_.data(), infos_.data(), is_tiled_ ? tiles_.data() : nullptr, rows_.data(),
                rounded_.data()};
    }

   private:
    void grow(int64_t tokens, int64_t blocks) {
        if (static_cast<size_t>(tokens) > rows_.size()) rows_.resize(static_cast<size_t>(tokens));
        const auto tiles = static_cast<size_t>((tokens + kTileTokens - 1) / kTileTokens * blocks);
        const auto rows = static_cast<size_t>(tokens * blocks);
        if (is_tiled_) {
            if (tiles > tiles_.size()) tiles_.resize(tiles);
        } else if (rows > infos_.size()) {
            values_.resize(rows * kBlockBytes);
            infos_.resize(rows);
        }
    }
    void quantize_to_tile(const Kernels& set, const float* row, int64_t blocks, int64_t token) {
        static thread_local std::vector<int8_t> values;
        static thread_local std::vector<BlockInfo> infos;
        if (static_cast<size_t>(blocks) > infos.size()) {
            values.resize(static_cast<size_t>(blocks * kBlockBytes));
            infos.resize(static_cast<size_t>(blocks));
        }
        set.quantize(row, blocks, Precision::kFast, values.data(), infos.data());
        TileBlock* const tile = tiles_.data() + token / kTileTokens * blocks;
        for (int64_t b = 0; b < blocks; ++b) {
            tile[b].set(token % kTileTokens, values.data() + b * kBlock,
                        infos[static_cast<size_t>(b)]);
        }
    }

    bool takes_parts_;
    bool is_tiled_ = false;
    std::vector<TileBlock> tiles_;
    std::vector<const float*> rows_;
    std::vector<int8_t> values_;
    std::vector<BlockInfo> infos_;
    std::vector<uint16_t> rounded_;
};

// One of several products that are computed together; y as below.
struct Product {
    const Projection* projection;
    Activation x;
    int64_t num_tokens;
    float* y;
};

// Computes all products in one parallel loop.
void multiply_all(const std::vector<Product>& products);

// y (num_tokens, projection.rows()), dense, = [y +] x . matrix^T + bias.
void multiply(const Projection& projection, const Activation& x, int64_t num_tokens, float* y,
              bool accumulate);

}  // namespace cortexd
