// Repacking: unpack one 32-block of one row to plain integers and scales, then place them.
#include "pack.h"

#include <cstring>
#include <type_traits>

#include "pool.h"

namespace cortexd {
namespace {

constexpr int64_t kSuperBlock = 256;

// One 32-block of one row: stored (unsigned) integers and raw scale bytes.
struct Block {
    uint8_t value[kBlock];
    uint16_t scale;     // f16 of the block, or d of its super-block
    uint16_t minimum;   // f16 of the block, or dmin of its super-block
    uint8_t factor[2];  // super-blocks: scale and minimum, or the two half scales
};

void low_then_high_nibbles(const uint8_t* nibbles, uint8_t* value) {
    for (int j = 0; j < 16; ++j) {
        value[j] = nibbles[j] & 15;
        value[j + 16] = nibbles[j] >> 4;
    }
}

void add_fifth_bits(const uint8_t* bits, uint8_t* value) {
    uint32_t word;
    std::memcpy(&word, bits, 4);
    for (int j = 0; j < kBlock; ++j) value[j] |= ((word >> j) & 1) << 4;
}

// The 6-bit scale and minimum of 32-block `j` of a Q4_K or Q5_K super-block.
void k_factors(const uint8_t* packed, int j, uint8_t* factor) {
    if (j < 4) {
        factor[0] = packed[j] & 63;
        factor[1] = packed[j + 4] & 63;
    } else {
        factor[0] = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4);
        factor[1] = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4);
    }
}

void read_block(LayoutQ4_0, const uint8_t* row, int64_t b, Block& block) {
    const uint8_t* p = row + b * 18;
    std::memcpy(&block.scale, p, 2);
    low_then_high_nibbles(p + 2, block.value);
}

void read_block(LayoutQ4_1, const uint8_t* row, int64_t b, Block& block) {
    const uint8_t* p = row + b * 20;
    std::memcpy(&block.scale, p, 2);
    std::memcpy(&block.minimum, p + 2, 2);
    low_then_high_nibbles(p + 4, block.value);
}

void read_block(LayoutQ5_0, const uint8_t* row, int64_t b, Block& block) {
    const uint8_t* p = row + b * 22;
    std::memcpy(&block.scale, p, 2);
    low_then_high_nibbles(p + 6, block.value);
    add_fifth_bits(p + 2, block.value);
}

void read_block(LayoutQ5_1, const uint8_t* row, int64_t b, Block& block) {
    const uint8_t* p = row + b * 24;
    std::memcpy(&block.scale, p, 2);
    std::memcpy(&block.minimum, p + 2, 2);
    low_then_high_nibbles(p + 8, block.value);
    add_fifth_bits(p + 4, block.value);
}

void read_block(LayoutQ8_0, const uint8_t* row, int64_t b, Block& block) {
    const uint8_t* p = row + b * 34;
    std::memcpy(&block.scale, p, 2);
    for (int j = 0; j < kBlock; ++j) block.value[j] = p[2 + j] ^ 0x80;  // -128..127 as 0..255
}

// Q4_K, Q5_K: nibbles of 64 elements share 32 bytes, low nibbles first.
void read_k_nibbles(const uint8_t* nibbles, int j, uint8_t* value) {
    const uint8_t* bytes = nibbles + j / 2 * 32;
    for (int i = 0; i < kBlock; ++i) value[i] = j % 2 == 0 ? bytes[i] & 15 : bytes[i] >> 4;
}

void read_block(LayoutQ4_K, const uint8_t* row, int64_t b, Block& block) {
    const uint8_t* p = row + b / 8 * 144;
    const int j = static_cast<int>(b % 8);
    std::memcpy(&block.scale, p, 2);
    std::memcpy(&block.minimum, p + 2, 2);
    k_factors(p + 4, j, block.factor);
    read_k_nibbles(p + 16, j, block.value);
}

void read_block(LayoutQ5_K, const uint8_t* row, int64_t b, Block& block) {
    const uint8_t* p = row + b / 8 * 176;
    const int j = static_cast<int>(b % 8);
    std::memcpy(&block.scale, p, 2);
    std::memcpy(&block.minimum, p + 2, 2);
    k_factors(p + 4, j, block.factor);
    read_k_nibbles(p + 48, j, block.value);
    for (int i = 0; i < kBlock; ++i) block.value[i] |= ((p[16 + i] >> j) & 1) << 4;
}

// Q6_K: two halves of 128; in each, 32-block q takes its low bits from 64 bytes (nibble q / 2)
// and its high two bits from 32 bytes (bits 2q, 2q + 1).
void read_block(LayoutQ6_K, const uint8_t* row, int64_t b, Block& block) {
    const uint8_t* p = row + b / 8 * 210;
    const int half = static_cast<int>(b % 8) / 4;
    const int q = static_cast<int>(b % 4);
    const uint8_t* low = p + half * 64 + q % 2 * 32;
    const uint8_t* high = p + 128 + half * 32;
    for (int i = 0; i < kBlock; ++i) {
        const int nibble = q < 2 ? low[i] & 15 : low[i] >> 4;
        block.value[i] = static_cast<uint8_t>(nibble | ((high[i] >> (2 * q)) & 3) << 4);
    }
    std::memcpy(block.factor, p + 192 + b % 8 * 2, 2);
    std::memcpy(&block.scale, p + 208, 2);
}

void read_block(LayoutIQ4_NL, const uint8_t* row, int64_t b, Block& block) {
    read_block(LayoutQ4_0{}, row, b, block);
}

// d, the high two bits of eight 6-bit scales, the low four bits, nibbles.
void read_block(LayoutIQ4_XS, const uint8_t* row, int64_t b, Block& block) {
    const uint8_t* p = row + b / 8 * 136;
    const int j = static_cast<int>(b % 8);
    std::memcpy(&block.scale, p, 2);
    uint16_t high;
    std::memcpy(&high, p + 2, 2);
    const int low = p[4 + j / 2] >> (j % 2 * 4) & 15;
    block.factor[0] = static_cast<uint8_t>((low | (high >> (2 * j) & 3) << 4) - 32);
    low_then_high_nibbles(p + 8 + j * 16, block.value);
}

// The scale is 2^(e - 127), and the integers are twice the numbers: 2^(e - 128) as a bfloat16.
void read_block(LayoutMXFP4, const uint8_t* row, int64_t b, Block& block) {
    const uint8_t* p = row + b * 17;
    // 2^-127 and 2^-128 are subnormal.
    block.scale = static_cast<uint16_t>(p[0] > 1 ? (p[0] - 1) << 7 : 0x20 << p[0]);
    low_then_high_nibbles(p + 1, block.value);
}

// A quad of a row is one word of its payload lines. Words are bytes in memory order, and no shift here
// carries a bit from one byte to another.
template <class L>
void place_payload(const uint8_t* value, int64_t r, uint8_t* payload) {
    uint32_t quads[8];
    std::memcpy(quads, value, sizeof(quads));
    const auto place = [&](int64_t line, uint32_t word) {
        std::memcpy(payload + line * 64 + r * 4, &word, 4);
    };
    if constexpr (L::kBits == 8) {
        for (int quad = 0; quad < 8; ++quad) place(quad, quads[quad]);
        return;
    }
    constexpr uint32_t kNibbles = 0x0f0f0f0f;
    for (int quad = 0; quad < 4; ++quad) {
        place(quad, (quads[quad] & kNibbles) | (quads[quad + 4] & kNibbles) << 4);
    }
    if constexpr (L::kBits == 5) {
        uint32_t bits = 0;
        for (int quad = 0; quad < 8; ++quad) bits |= (quads[quad] >> 4 & 0x01010101) << quad;
        place(4, bits);
    }
    if constexpr (L::kBits == 6) {
        for (int line = 0; line < 2; ++line) {
            uint32_t bits = 0;
            for (int i = 0; i < 4; ++i) bits |= (quads[line * 4 + i] >> 4 & 0x03030303) << (2 * i);
            place(4 + line, bits);
        }
    }
}

template <class L>
void place_meta(const Block& block, int64_t b, int64_t r, uint8_t* meta) {
    if (L::kSuperBlocks) {
        uint8_t* super = meta + b / 8 * 320;
        std::memcpy(super + r * 2, &block.scale, 2);
        if (L::kHasMin) std::memcpy(super + 32 + r * 2, &block.minimum, 2);
        super[64 + b % 8 * 32 + r] = block.factor[0];
        super[64 + b % 8 * 32 + 16 + r] = block.factor[1];
        return;
    }
    uint8_t* record = meta + b * (L::kHasMin ? 64 : 32);
    std::memcpy(record + r * 2, &block.scale, 2);
    if (L::kHasMin) std::memcpy(record + 32 + r * 2, &block.minimum, 2);
}

// Where the rows of one group are.
using GroupRows = const uint8_t* const (&)[kRows];

template <class L>
void pack_group(GroupRows source, int64_t rows, int64_t blocks, uint8_t* group) {
    std::memset(group, 0, static_cast<size_t>(L::meta_bytes(blocks)));
    if (rows < kRows) std::memset(group, 0, static_cast<size_t>(L::group_bytes(blocks)));
    uint8_t* payload = group + L::meta_bytes(blocks);
    for (int64_t b = 0; b < blocks; ++b) {
        for (int64_t r = 0; r < rows; ++r) {
            Block block{};
            read_block(L{}, source[r], b, block);
            place_meta<L>(block, b, r, group);
            place_payload<L>(block.value, r, payload + b * L::kPayload);
        }
    }
}

// `Number` is the unsigned integer of the size of one number.
template <class D, class Number>
void pack_dense_group(GroupRows source, int64_t rows, int64_t columns, uint8_t* group) {
    if (rows < kRows) std::memset(group, 0, static_cast<size_t>(D::group_bytes(columns)));
    if (D::kType == Type::BF16 && rows == kRows) {  // two columns of a row are one word
        for (int64_t pair = 0; pair < columns / 2; ++pair) {
            for (int64_t r = 0; r < kRows; ++r) {
                std::memcpy(group + (pair * kRows + r) * 4, source[r] + pair * 4, 4);
            }
        }
        return;
    }
    for (int64_t r = 0; r < rows; ++r) {
        const uint8_t* from = source[r];
        for (int64_t k = 0; k < columns; ++k, from += sizeof(Number)) {
            const int64_t lane = D::kType == Type::BF16 ? r * 2 + k % 2 : k % 2 * kRows + r;
            std::memcpy(group + k / 2 * D::kPairBytes + lane * sizeof(Number), from,
                        sizeof(Number));
        }
    }
}

int64_t total_rows(const PlainRows* parts, int64_t num_parts) {
    int64_t rows = 0;
    for (int64_t part = 0; part < num_parts; ++part) rows += parts[part].rows;
    return rows;
}

// Finds `count` rows from `row` on; groups may begin and end inside of parts.
void find_rows(const PlainRows* parts, int64_t row, int64_t count, const uint8_t** found) {
    while (row >= parts->rows) row -= parts++->rows;
    for (int64_t r = 0; r < count; ++r, ++row) {
        while (row == parts->rows) {
            ++parts;
            row = 0;
        }
        found[r] = parts->data + row * parts->row_bytes;
    }
}

// Calls place(rows, how many, destination) for each group of rows, on all threads.
template <class Place>
void for_each_group(const PlainRows* parts, int64_t rows, int64_t group_bytes,
                    uint8_t* destination, const Place& place) {
    parallel_for((rows + kRows - 1) / kRows, 4, [&](int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; ++g) {
            const int64_t left = rows - g * kRows;
            const int64_t count = left < kRows ? left : kRows;
            const uint8_t* found[kRows];
            find_rows(parts, g * kRows, count, found);
            place(found, count, destination + g * group_bytes);
        }
    });
}

bool fits_dense(int64_t rows, int64_t columns) {
    return rows > 0 && columns > 0 && columns % kBlock == 0;
}

template <class L>
bool fits(int64_t rows, int64_t columns) {
    return rows > 0 && columns > 0 && columns % (L::kSuperBlocks ? kSuperBlock : kBlock) == 0;
}

int64_t num_groups(int64_t rows) { return (rows + kRows - 1) / kRows; }

}  // namespace

int64_t packed_bytes(Type type, int64_t rows, int64_t columns) {
    int64_t bytes = -1;
    visit_layout(type, [&](auto layout) {
        using L = decltype(layout);
        if (fits<L>(rows, columns)) bytes = num_groups(rows) * L::group_bytes(columns / kBlock);
    });
    visit_dense(type, [&](auto dense) {
        if (fits_dense(rows, columns)) bytes = num_groups(rows) * dense.group_bytes(columns);
    });
    return bytes;
}

bool pack(Type type, const PlainRows* parts, int64_t num_parts, int64_t columns,
          uint8_t* destination) {
    const int64_t rows = total_rows(parts, num_parts);
    if (packed_bytes(type, rows, columns) < 0) return false;
    visit_layout(type, [&](auto layout) {
        using L = decltype(layout);
        const int64_t blocks = columns / kBlock;
        for_each_group(parts, rows, L::group_bytes(blocks), destination,
                       [&](GroupRows found, int64_t count, uint8_t* group) {
                           pack_group<L>(found, count, blocks, group);
                       });
    });
    visit_dense(type, [&](auto dense) {
        using D = decltype(dense);
        using Number = std::conditional_t<D::kNumberBytes == 4, uint32_t, uint16_t>;
        for_each_group(parts, rows, D::group_bytes(columns), destination,
                       [&](GroupRows found, int64_t count, uint8_t* group) {
                           pack_dense_group<D, Number>(found, count, columns, group);
                       });
    });
    return true;
}

}  // namespace cortexd
