// A barrier between processes that share memory: the ranks of one model on one host.
#pragma once

#include <cstdint>

namespace cortexd {

// The shared words of one group, 64 bytes apart so that no two are in one cache line: how many
// barriers each rank has reached, and how many ranks sleep. All zero at first.
constexpr int64_t kWordStride = 16;  // in words of 4 bytes

// Reaches barrier number `round` (1, 2, ... modulo 2^32) as `rank` and waits for the others: it
// spins `num_spins` times, then sleeps in the kernel. What a rank wrote before, all others see
// afterwards. Returns the first rank that did not come within the time, -1 when all came.
int wait_at_barrier(uint32_t* words, int rank, int world_size, uint32_t round, int num_spins,
                    int64_t timeout_us);

}  // namespace cortexd
