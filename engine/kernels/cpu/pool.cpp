// Thread pool: see pool.h. Workers spin for a short while after a job and then sleep in the
// kernel, so an idle engine uses no CPU and a running step pays no wake-up between its parts.
#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace cortexd {
namespace {

// About 50 microseconds: longer than the gaps between the parts of one decode step (1-10 us),
// far shorter than the gap between two requests.
constexpr int kSpinRounds = 1500;
// A worker that still holds a chunk was most likely preempted; then its core may need ours.
constexpr int kFinishSpinRounds = 4000;

inline void pause_cpu() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Threads that the pool can hold; more than any machine's CPUs.
constexpr int kMaxThreads = 1024;

// A thread's share of a job: the job's generation, the end of the share and its next unclaimed chunk
// in one word. A claim or a theft is a compare-and-swap of that word, so it can only succeed while the
// same job is unfinished: a worker that slept through a job can never run a chunk of it, nor read its
// dead context.
constexpr uint64_t kFieldBits = 14;  // leaves 36 bits: the generation never wraps in practice
constexpr uint64_t kFieldMask = (uint64_t{1} << kFieldBits) - 1;
constexpr int64_t kMaxChunks = static_cast<int64_t>(kFieldMask);

uint64_t next_of(uint64_t word) { return word & kFieldMask; }
uint64_t end_of(uint64_t word) { return (word >> kFieldBits) & kFieldMask; }
uint64_t generation_of(uint64_t word) { return word >> (2 * kFieldBits); }
uint64_t left_in(uint64_t word) { return end_of(word) - next_of(word); }
uint64_t share_of(uint64_t generation, uint64_t next, uint64_t end) {
    return generation << (2 * kFieldBits) | end << kFieldBits | next;
}

struct alignas(64) Share {
    std::atomic<uint64_t> word{0};
};

class Pool {
   public:
    void run(int64_t count, int64_t grain, RangeBody body, void* context) {
        std::lock_guard<std::mutex> turn(turn_);
        start_workers();
        int64_t chunks = (count + grain - 1) / grain;
        if (chunks > kMaxChunks) {
            grain = (count + kMaxChunks - 1) / kMaxChunks;
            chunks = (count + grain - 1) / grain;
        }
        count_.store(count, std::memory_order_relaxed);
        grain_.store(grain, std::memory_order_relaxed);
        body_.store(body, std::memory_order_relaxed);
        context_.store(context, std::memory_order_relaxed);
        finished_.store(0, std::memory_order_relaxed);
        const uint64_t generation = generation_.load(std::memory_order_relaxed) + 1;
        const auto threads = static_cast<uint64_t>(active_.load(std::memory_order_relaxed)) + 1;
        for (uint64_t i = 0; i < threads; ++i) {
            const auto all = static_cast<uint64_t>(chunks);
            shares_[i].word.store(share_of(generation, all * i / threads, all * (i + 1) / threads),
                                  std::memory_order_release);
        }
        generation_.store(generation, std::memory_order_seq_cst);
        if (sleeping_.load(std::memory_order_seq_cst) > 0) {
            std::lock_guard<std::mutex> lock(sleep_);
            wake_.notify_all();
        }
        work(0);
        for (int round = 0; finished_.load(std::memory_order_acquire) != chunks; ++round) {
            if (round < kFinishSpinRounds) {
                pause_cpu();
            } else {
                sched_yield();
            }
        }
    }

    void set_threads(int count) {
        std::lock_guard<std::mutex> turn(turn_);
        const int at_most = count < kMaxThreads ? count : kMaxThreads;
        threads_wanted_.store(at_most < 1 ? 1 : at_most, std::memory_order_relaxed);
    }

    int threads() const { return threads_wanted_.load(std::memory_order_relaxed); }

   private:
    void start_workers() {
        const int workers = threads() - 1;
        while (started_ < workers) {
            const int index = started_++;
            // Detached and never stopped: they sleep when idle, and a join at interpreter exit
            // could hang behind a thread that the exit already took away.
            std::thread([this, index] { worker(index); }).detach();
        }
        active_.store(workers, std::memory_order_relaxed);
    }

    void worker(int index) {
        uint64_t seen = 0;
        for (;;) {
            seen = wait_for_job(seen);
            if (index < active_.load(std::memory_order_relaxed)) work(index + 1);
        }
    }

    uint64_t wait_for_job(uint64_t seen) {
        for (int round = 0; round < kSpinRounds; ++round) {
            const uint64_t generation = generation_.load(std::memory_order_acquire);
            if (generation != seen) return generation;
            pause_cpu();
        }
        std::unique_lock<std::mutex> lock(sleep_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_seq_cst) != seen; });
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
        return generation_.load(std::memory_order_acquire);
    }

    void work(int thread) {
        std::atomic<uint64_t>& own = shares_[thread].word;
        do {
            const int64_t done = run_share(own);
            // Told once per share: a counter that every chunk of both threads writes would travel
            // between the cores all the time.
            if (done > 0) finished_.fetch_add(done, std::memory_order_release);
        } while (steal(own));
    }

    // Runs what is left of a share; returns how many chunks that were.
    int64_t run_share(std::atomic<uint64_t>& share) {
        int64_t done = 0;
        uint64_t word = share.load(std::memory_order_acquire);
        while (left_in(word) > 0) {
            // Read before the claim; the claim proves that they belong to this job.
            const int64_t count = count_.load(std::memory_order_relaxed);
            const int64_t grain = grain_.load(std::memory_order_relaxed);
            const RangeBody body = body_.load(std::memory_order_relaxed);
            void* const context = context_.load(std::memory_order_relaxed);
            if (!share.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel,
                                             std::memory_order_acquire)) {
                continue;
            }
            const int64_t begin = static_cast<int64_t>(next_of(word)) * grain;
            const int64_t end = begin + grain < count ? begin + grain : count;
            body(context, begin, end);
            ++done;
            word = share.load(std::memory_order_acquire);
        }
        return done;
    }

    // Moves the second half of what another thread has left to the empty share of this one; false
    // when there is nothing left.
    bool steal(std::atomic<uint64_t>& own) {
        const uint64_t empty = own.load(std::memory_order_acquire);
        if (left_in(empty) > 0) return true;  // the next job has begun
        const uint64_t generation = generation_of(empty);
        const int threads = active_.load(std::memory_order_relaxed) + 1;
        for (int i = 0; i < threads; ++i) {
            std::atomic<uint64_t>& other = shares_[i].word;
            uint64_t word = other.load(std::memory_order_acquire);
            // Only of the job whose empty share this thread holds: the next job's shares may be in
            // the making, this thread's among them.
            while (left_in(word) > 0 && generation_of(word) == generation) {
                const uint64_t middle = next_of(word) + left_in(word) / 2;
                if (other.compare_exchange_weak(word, share_of(generation, next_of(word), middle),
                                                std::memory_order_acq_rel,
                                                std::memory_order_acquire)) {
                    own.store(share_of(generation, middle, end_of(word)),
                              std::memory_order_release);
                    return true;
                }
            }
        }
        return false;
    }

    std::mutex turn_;
    std::atomic<int> threads_wanted_{1};
    int started_ = 0;
    std::atomic<int> active_{0};

    Share shares_[kMaxThreads];
    alignas(64) std::atomic<uint64_t> generation_{0};
    alignas(64) std::atomic<int64_t> finished_{0};
    alignas(64) std::atomic<int64_t> count_{0};
    std::atomic<int64_t> grain_{1};
    std::atomic<RangeBody> body_{nullptr};
    std::atomic<void*> context_{nullptr};

    std::mutex sleep_;
    std::condition_variable wake_;
    std::atomic<int> sleeping_{0};
};

Pool* pool_instance = nullptr;

// A forked child has none of the workers and may have inherited a held lock: it starts afresh.
// The old pool is left as it is (its condition variable must not be destroyed with waiters).
void renew_in_child() { pool_instance = new Pool(); }

Pool& pool() {
    static const bool created = [] {
        pool_instance = new Pool();
        pthread_atfork(nullptr, nullptr, renew_in_child);
        return true;
    }();
    (void)created;
    return *pool_instance;
}

}  // namespace

void parallel_range(int64_t count, int64_t grain, RangeBody body, void* context) {
    if (count <= 0) return;
    if (grain < 1) grain = 1;
    if (count <= grain || num_threads() == 1) {
        body(context, 0, count);
        return;
    }
    pool().run(count, grain, body, context);
}

void set_num_threads(int count) { pool().set_threads(count); }
int num_threads() { return pool().threads(); }

}  // namespace cortexd
