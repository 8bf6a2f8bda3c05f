// The products of quantised rows with many tokens: a panel of weights is unpacked to bytes and floats
// once, in the first-level cache, and serves all tokens. With AVX-512.
//
// The bits are those of linear_kernel.h: the same integers, and the same operations in float32.
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "linear_kernel.h"
#include "output.h"
#include "vec_avx512.h"

namespace cortexd {
namespace {

// 64 rows of 256 columns: 20 KiB, beside 4 KiB of activations.
constexpr int64_t kPanelGroups = 4;
constexpr int64_t kPanelBlocks = 8;
// The tokens of one pass over a panel; their sums of 64 rows are 128 KiB in the second-level cache.
constexpr int64_t kPanelTokens = 512;

// A block of 16 rows: unsigned bytes with the offset 128 (or none, for types that have none).
struct alignas(64) PanelBlock {
    uint8_t quads[kBlock / 4][64];
    float scale[kRows];
    float second[kRows];  // minimum, or scale of the second half
};

struct alignas(64) TileSums {
    float of[kTileTokens][kRows];
};

template <class L, int Quad>
void unpack_line(const uint8_t* payload, PanelBlock& block) {
    __m512i first, second;
    Avx512::unpack<L, Quad>(payload, first, second);
    if constexpr (L::kHasOffset) {
        const __m512i shift = _mm512_set1_epi8(128 - (1 << L::kOffsetShift));
        first = _mm512_add_epi8(first, shift);
        second = _mm512_add_epi8(second, shift);
    }
    _mm512_store_si512(block.quads[Quad], first);
    _mm512_store_si512(block.quads[Quad + 4], second);
}

template <class L>
void unpack_panel(const uint8_t* group, int64_t blocks, int64_t first, int64_t last,
                  PanelBlock* panel) {
    const uint8_t* payload = group + L::meta_bytes(blocks) + first * L::kPayload;
    for (int64_t b = first; b < last; ++b, payload += L::kPayload, ++panel) {
        unpack_line<L, 0>(payload, *panel);
        unpack_line<L, 1>(payload, *panel);
        unpack_line<L, 2>(payload, *panel);
        unpack_line<L, 3>(payload, *panel);
        const auto scales = BlockScales<Avx512, L>::load(group, b);
        _mm512_store_ps(panel->scale, scales.scale);
        if constexpr (L::kHasMin || L::kHalves) _mm512_store_ps(panel->second, scales.second);
    }
}

// Asks for what unpack_panel will read.
template <class L>
void prefetch_panel(const uint8_t* group, int64_t blocks, int64_t first, int64_t last) {
    const uint8_t* const meta = group + L::meta_bytes(first);
    const uint8_t* const payload = group + L::meta_bytes(blocks) + first * L::kPayload;
    for (const uint8_t* p = meta; p < group + L::meta_bytes(last); p += 64) __builtin_prefetch(p, 0, 2);
    for (const uint8_t* p = payload; p < payload + (last - first) * L::kPayload; p += 64) {
        __builtin_prefetch(p, 0, 2);
    }
}

// Asks for part `i` of `parts` of the blocks that come after those being multiplied.
void prefetch_blocks(const TileBlock* x, int64_t count, int64_t i, int64_t parts) {
    const auto* const bytes = reinterpret_cast<const uint8_t*>(x);
    const int64_t lines = count * static_cast<int64_t>(sizeof(TileBlock)) / 64;
    for (int64_t line = lines * i / parts; line < lines * (i + 1) / parts; ++line) {
        __builtin_prefetch(bytes + line * 64, 0, 3);
    }
}

// The integer sums of quads First..Last-1.
template <int First, int Last>
void add_quads(const PanelBlock& weights, const TileBlock& x, __m512i (&dots)[kTileTokens]) {
    for (int quad = First; quad < Last; ++quad) {
        const __m512i line = _mm512_load_si512(weights.quads[quad]);
        for (int m = 0; m < kTileTokens; ++m) {
            dots[m] = _mm512_dpbusd_epi32(dots[m], line, Avx512::broadcast_quad(x.quads[quad][m]));
        }
    }
}

// 16 rows x 8 tokens x `count` blocks, added to `sums`.
template <class L>
void multiply_panel(const PanelBlock* weights, const TileBlock* x, int64_t count, TileSums& out) {
    using F = Avx512::F;
    F sums[kTileTokens];
    for (int m = 0; m < kTileTokens; ++m) sums[m] = _mm512_load_ps(out.of[m]);
    for (int64_t b = 0; b < count; ++b, ++weights, ++x) {
        __m512i dots[kTileTokens];
        if constexpr (L::kHalves) {
            F halves[kTileTokens];
            for (int m = 0; m < kTileTokens; ++m) dots[m] = _mm512_set1_epi32(x->half_offsets[0][m]);
            add_quads<0, 4>(*weights, *x, dots);
            for (int m = 0; m < kTileTokens; ++m) {
                halves[m] = _mm512_mul_ps(_mm512_load_ps(weights->scale), _mm512_cvtepi32_ps(dots[m]));
                dots[m] = _mm512_set1_epi32(x->half_offsets[1][m]);
            }
            add_quads<4, 8>(*weights, *x, dots);
            for (int m = 0; m < kTileTokens; ++m) {
                const F second =
                    _mm512_mul_ps(_mm512_load_ps(weights->second), _mm512_cvtepi32_ps(dots[m]));
                const F both = _mm512_add_ps(halves[m], second);
                sums[m] = _mm512_add_ps(sums[m], _mm512_mul_ps(both, _mm512_set1_ps(x->scale[m])));
            }
            continue;
        }
        for (int m = 0; m < kTileTokens; ++m) {
            dots[m] = L::kHasOffset ? _mm512_set1_epi32(x->offset[m]) : _mm512_setzero_si512();
        }
        add_quads<0, 8>(*weights, *x, dots);
        const F scale = _mm512_load_ps(weights->scale);
        for (int m = 0; m < kTileTokens; ++m) {
            F term = _mm512_mul_ps(_mm512_mul_ps(scale, _mm512_set1_ps(x->scale[m])),
                                   _mm512_cvtepi32_ps(dots[m]));
            if constexpr (L::kHasMin) {
                const F minimum = _mm512_mul_ps(_mm512_load_ps(weights->second),
                                                _mm512_set1_ps(x->scaled_sum[m]));
                term = L::kSuperBlocks ? _mm512_sub_ps(term, minimum)
                                       : _mm512_add_ps(term, minimum);
            }
            sums[m] = _mm512_add_ps(sums[m], term);
        }
    }
    for (int m = 0; m < kTileTokens; ++m) _mm512_store_ps(out.of[m], sums[m]);
}

// Scratch memory of a thread: 148 KiB.
struct PanelScratch {
    PanelBlock panel[kPanelGroups][kPanelBlocks];
    TileSums sums[kPanelTokens / kTileTokens][kPanelGroups];
};

// How many of `num_tokens` are in the tile that begins with `token`.
int64_t tokens_of_tile(int64_t token, int64_t num_tokens) {
    return num_tokens - token < kTileTokens ? num_tokens - token : kTileTokens;
}

// The sums of up to 4 groups x up to 512 tokens.
template <class L>
void multiply_pass(const Matrix& matrix, int64_t g, int64_t num_groups, const TileBlock* x,
                   int64_t num_tokens, const Destination& to, PanelScratch& scratch) {
    const int64_t num_tiles = (num_tokens + kTileTokens - 1) / kTileTokens;
    const int64_t blocks = matrix.columns / kBlock;
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
        std::memset(scratch.sums[tile], 0, sizeof(scratch.sums[tile]));
    }
    for (int64_t first = 0; first < blocks; first += kPanelBlocks) {
        const int64_t left = blocks - first;
        const int64_t count = left < kPanelBlocks ? left : kPanelBlocks;
        for (int64_t i = 0; i < num_groups; ++i) {
            unpack_panel<L>(matrix.packed + (g + i) * L::group_bytes(blocks), blocks, first,
                            first + count, scratch.panel[i]);
        }
        const int64_t next = first + kPanelBlocks < blocks ? first + kPanelBlocks : 0;
        for (int64_t i = 0; i < num_groups; ++i) {
            const int64_t row = next > 0 ? g + i : g + num_groups + i;
            prefetch_panel<L>(matrix.packed + row * L::group_bytes(blocks), blocks, next,
                              next + count);
        }
        for (int64_t tile = 0; tile < num_tiles; ++tile) {
            const TileBlock* const now = x + tile * blocks + first;
            if (next == 0) {
                const int64_t token = tile * kTileTokens;
                prefetch_outputs(to, g, num_groups, token, tokens_of_tile(token, num_tokens));
            }
            for (int64_t i = 0; i < num_groups; ++i) {
                prefetch_blocks(now + blocks, count, i, num_groups);
                multiply_panel<L>(scratch.panel[i], now, count, scratch.sums[tile][i]);
            }
        }
    }
}

void store_pass(const Matrix& matrix, int64_t g, int64_t num_groups, int64_t num_tokens,
                const Destination& to, const PanelScratch& scratch) {
    for (int64_t token = 0; token < num_tokens; token += kTileTokens) {
        for (int64_t i = 0; i < num_groups; ++i) {
            const Output out(matrix, g + i, to);
            const TileSums& sums = scratch.sums[token / kTileTokens][i];
            for (int64_t m = 0; m < tokens_of_tile(token, num_tokens); ++m) {
                out.store<Avx512>(_mm512_load_ps(sums.of[m]), token + m);
            }
        }
    }
}

void multiply_tiles(const Matrix& matrix, const Activation& x, int64_t num_tokens, int64_t begin,
                    int64_t end, float* y, int64_t y_stride, bool accumulate) {
    static thread_local PanelScratch scratch;
    const int64_t blocks = matrix.columns / kBlock;
    for (int64_t g = begin; g < end; g += kPanelGroups) {
        const int64_t num_groups = end - g < kPanelGroups ? end - g : kPanelGroups;
        for (int64_t first = 0; first < num_tokens; first += kPanelTokens) {
            const int64_t left = num_tokens - first;
            const int64_t count = left < kPanelTokens ? left : kPanelTokens;
            const Destination to{y + first * y_stride, y_stride, accumulate};
            const TileBlock* const tiles = x.tiles + first / kTileTokens * blocks;
            visit_layout(matrix.type, [&](auto layout) {
                multiply_pass<decltype(layout)>(matrix, g, num_groups, tiles, count, to, scratch);
            });
            store_pass(matrix, g, num_groups, count, to, scratch);
        }
    }
}

}  // namespace

Kernels with_tiles(const Kernels& base) {
    Kernels set = base;
    set.multiply_tiles = multiply_tiles;
    return set;
}

}  // namespace cortexd
