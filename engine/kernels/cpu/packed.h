// How a weight matrix lies in memory after repacking, for every supported GGML type.
//
// Quantised types:
//
// Rows are taken in groups of 16 (the last group is padded with zero rows). A group is
//   [meta: one record per 32-block, or per 256-block] [payload: one record per 32-block]
// so that both streams are read forwards and every payload line of 64 bytes is aligned. A payload
// line holds 4 consecutive elements of each of the 16 rows: byte r * 4 + j is row r, element j of
// a quad. The quantised integers are kept exactly; only their order changes.
//
// Dense types (see Dense): groups of 16 rows as well, without meta; the numbers are kept exactly.
#pragma once

#include <cstdint>

namespace cortexd {

constexpr int64_t kRows = 16;   // rows per group
constexpr int64_t kBlock = 32;  // elements per activation block

// GGML's own type numbers, as found in GGUF files.
enum class Type : int32_t {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    IQ4_NL = 20,
    IQ4_XS = 23,
    BF16 = 30,
    MXFP4 = 39,
};

// Dense groups hold, for each pair of columns, two numbers of each of the 16 rows: BF16 one 64-byte
// line whose words are (first, second column) of a row, F16 and F32 the 16 rows of the first column,
// then those of the second.
template <Type DenseType>
struct Dense {
    static constexpr Type kType = DenseType;
    static constexpr int64_t kNumberBytes = DenseType == Type::F32 ? 4 : 2;
    static constexpr int64_t kPairBytes = 2 * kRows * kNumberBytes;

    static constexpr int64_t group_bytes(int64_t columns) { return columns / 2 * kPairBytes; }
};

constexpr bool is_dense(Type type) {
    return type == Type::F32 || type == Type::F16 || type == Type::BF16;
}

// Calls `visitor(Dense<..>{})` for `type`; false when it is not dense.
template <class Visitor>
bool visit_dense(Type type, Visitor&& visitor) {
    switch (type) {
        case Type::F32: visitor(Dense<Type::F32>{}); return true;
        case Type::F16: visitor(Dense<Type::F16>{}); return true;
        case Type::BF16: visitor(Dense<Type::BF16>{}); return true;
        default: return false;
    }
}

// How the scale of a block is stored in the meta stream.
enum class Scales {
    kPlain,      // 16 f16 scales per block
    kBrain,      // 16 bf16 scales per block
    kWithMin,    // 16 f16 scales, 16 f16 minima per block
    kSuper,      // per 256: 16 f16 d, 16 f16 dmin, then per block 16 u8 scales, 16 u8 minima
    kSuperHalf,  // per 256: 16 f16 d (and 32 B padding), per block 16 i8 scales for each half
    kSuperOne    // per 256: 16 f16 d (and 32 B padding), per block 16 i8 scales (and 16 B padding)
};

// What the stored bits stand for: integers, or places in a table of 16 integers.
enum class Code { kPlain, kIQ4, kFP4 };

// The integers of a table plus the layout's offset.
alignas(16) constexpr uint8_t kIQ4Table[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                               129, 141, 153, 166, 181, 197, 217, 241};
alignas(16) constexpr uint8_t kFP4Table[16] = {16, 17, 18, 19, 20, 22, 24, 28,
                                               16, 15, 14, 13, 12, 10, 8,  4};

// `kOffset` is subtracted from the stored unsigned integers: it is 0 or 1 << kOffsetShift.
template <int Bits, int OffsetShift, Scales ScaleKind, Code StoredCode = Code::kPlain>
struct Layout {
    static constexpr int kBits = Bits;
    static constexpr Code kCode = StoredCode;
    static constexpr const uint8_t* kTable =
        StoredCode == Code::kFP4 ? kFP4Table : kIQ4Table;
    static constexpr bool kHasOffset = OffsetShift >= 0;
    static constexpr int kOffsetShift = OffsetShift;
    static constexpr Scales kScales = ScaleKind;
    static constexpr bool kHasMin = ScaleKind == Scales::kWithMin || ScaleKind == Scales::kSuper;
    // The two halves of a block are scaled separately.
    static constexpr bool kHalves = ScaleKind == Scales::kSuperHalf;
    static constexpr int kParts = kHalves ? 2 : 1;
    // 4-bit types: 4 lines, low nibbles are quads 0-3, high nibbles quads 4-7. 5-bit: one more
    // line, bit t belongs to quad t. 6-bit: two more lines (quads 0-3, 4-7), bits 2t, 2t+1.
    static constexpr int64_t kPayload = Bits == 8 ? 512 : 256 + (Bits - 4) * 64;
    static constexpr bool kSuperBlocks = ScaleKind == Scales::kSuper ||
                                         ScaleKind == Scales::kSuperHalf ||
                                         ScaleKind == Scales::kSuperOne;

    static constexpr int64_t meta_bytes(int64_t blocks) {
        const int64_t bytes = kSuperBlocks ? blocks / 8 * (64 + 8 * 32)
                                           : blocks * (kHasMin ? 64 : 32);
        return (bytes + 63) / 64 * 64;
    }
    static constexpr int64_t group_bytes(int64_t blocks) {
        return meta_bytes(blocks) + blocks * kPayload;
    }
};

using LayoutQ4_0 = Layout<4, 3, Scales::kPlain>;
using LayoutQ4_1 = Layout<4, -1, Scales::kWithMin>;
using LayoutQ5_0 = Layout<5, 4, Scales::kPlain>;
using LayoutQ5_1 = Layout<5, -1, Scales::kWithMin>;
using LayoutQ8_0 = Layout<8, 7, Scales::kPlain>;
using LayoutQ4_K = Layout<4, -1, Scales::kSuper>;
using LayoutQ5_K = Layout<5, -1, Scales::kSuper>;
using LayoutQ6_K = Layout<6, 5, Scales::kSuperHalf>;
using LayoutIQ4_NL = Layout<4, 7, Scales::kPlain, Code::kIQ4>;
using LayoutIQ4_XS = Layout<4, 7, Scales::kSuperOne, Code::kIQ4>;
using LayoutMXFP4 = Layout<4, 4, Scales::kBrain, Code::kFP4>;

// Calls `visitor(Layout<..>{})` for `type`; false when it is not a quantised type.
template <class Visitor>
bool visit_layout(Type type, Visitor&& visitor) {
    switch (type) {
        case Type::Q4_0: visitor(LayoutQ4_0{}); return true;
        case Type::Q4_1: visitor(LayoutQ4_1{}); return true;
        case Type::Q5_0: visitor(LayoutQ5_0{}); return true;
        case Type::Q5_1: visitor(LayoutQ5_1{}); return true;
        case Type::Q8_0: visitor(LayoutQ8_0{}); return true;
        case Type::Q4_K: visitor(LayoutQ4_K{}); return true;
        case Type::Q5_K: visitor(LayoutQ5_K{}); return true;
        case Type::Q6_K: visitor(LayoutQ6_K{}); return true;
        case Type::IQ4_NL: visitor(LayoutIQ4_NL{}); return true;
        case Type::IQ4_XS: visitor(LayoutIQ4_XS{}); return true;
        case Type::MXFP4: visitor(LayoutMXFP4{}); return true;
        default: return false;
    }
}

// How exactly the right-hand side is taken; see activation.h.
enum class Precision : int32_t { kFast = 0, kExact = 1 };

struct Matrix {
    Type type;
    Precision precision;
    int64_t rows;            // out features
    int64_t columns;         // in features
    const uint8_t* packed;   // 64-byte aligned
    const float* bias;       // (rows,) or null
};

}  // namespace cortexd
