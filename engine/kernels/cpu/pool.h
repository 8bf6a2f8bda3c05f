// The thread pool all operations share: a parallel loop over chunks. Each thread has a share of chunks
// that lie side by side, which it claims one at a time; a thread that is done takes half of what
// another one has left.
//
// Side by side, because products ask for the weights that follow before they need them: chunks that
// go to whoever comes first put a third of those into the wrong core's cache, and two threads were
// hardly faster than one (Q4_0 at batch 1 on a Zen 4).
// Who computes a chunk never changes its result (every output element is computed by one thread
// in a fixed order), so chunks may change hands: a core that is taken away by another process, or a
// worker still asleep, then costs its share of the speed and not a stall.
#pragma once

#include <cstdint>

namespace cortexd {

// Runs `body(context, begin, end)` over [0, count) in chunks of `grain`, on the calling thread
// and the workers; returns when all of it is done. Calls from several threads take turns.
using RangeBody = void (*)(void* context, int64_t begin, int64_t end);
void parallel_range(int64_t count, int64_t grain, RangeBody body, void* context);

// Total threads including the caller, at least 1. Workers are started on first need.
void set_num_threads(int count);
int num_threads();

template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
    parallel_range(
        count, grain,
        [](void* context, int64_t begin, int64_t end) {
            (*static_cast<const Body*>(context))(begin, end);
        },
        const_cast<Body*>(&body));
}

}  // namespace cortexd
