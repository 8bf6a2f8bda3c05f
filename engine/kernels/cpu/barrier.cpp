// A barrier between processes: see barrier.h. Each rank writes only its own word, so none can be
// lost; a rank that is killed while it sleeps leaves a count too high, which costs needless wakes.
#include "barrier.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <ctime>

namespace cortexd {
namespace {

using Word = std::atomic<uint32_t>;
using Clock = std::chrono::steady_clock;
static_assert(sizeof(Word) == sizeof(uint32_t) && Word::is_always_lock_free,
              "the words are shared with other processes");

Word& word_of(uint32_t* words, int index) {
    return *reinterpret_cast<Word*>(words + index * kWordStride);
}

bool has_reached(uint32_t value, uint32_t round) {
    return static_cast<int32_t>(value - round) >= 0;  // the counts wrap
}

inline void pause_cpu() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Not FUTEX_PRIVATE: the waiters are in other processes.
void sleep_until_changed(Word& word, uint32_t value, int64_t timeout_us) {
    const timespec timeout{static_cast<time_t>(timeout_us / 1000000),
                           static_cast<long>(timeout_us % 1000000) * 1000};
    syscall(SYS_futex, &word, FUTEX_WAIT, value, &timeout, nullptr, 0);
}

bool wait_for(Word& word, Word& num_sleeping, uint32_t round, int num_spins,
              Clock::time_point deadline) {
    for (int spin = 0; spin < num_spins; ++spin) {
        if (has_reached(word.load(std::memory_order_acquire), round)) return true;
        pause_cpu();
    }
    for (;;) {
        const auto left = std::chrono::duration_cast<std::chrono::microseconds>(
            deadline - Clock::now());
        // Announced before the last look: who arrives behind it sees that there is one to wake.
        num_sleeping.fetch_add(1, std::memory_order_seq_cst);
        const uint32_t value = word.load(std::memory_order_seq_cst);
        const bool is_there = has_reached(value, round);
        if (!is_there && left.count() > 0) sleep_until_changed(word, value, left.count());
        num_sleeping.fetch_sub(1, std::memory_order_seq_cst);
        if (is_there) return true;
        if (left.count() <= 0) return false;
    }
}

}  // namespace

int wait_at_barrier(uint32_t* words, int rank, int world_size, uint32_t round, int num_spins,
                    int64_t timeout_us) {
    const auto deadline = Clock::now() + std::chrono::microseconds(timeout_us);
    Word& own = word_of(words, rank);
    Word& num_sleeping = word_of(words, world_size);
    own.store(round, std::memory_order_seq_cst);
    if (num_sleeping.load(std::memory_order_seq_cst) != 0) {
        syscall(SYS_futex, &own, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
    }
    for (int other = 0; other < world_size; ++other) {
        if (other == rank) continue;
        if (!wait_for(word_of(words, other), num_sleeping, round, num_spins, deadline)) {
            return other;
        }
    }
    return -1;
}

}  // namespace cortexd
