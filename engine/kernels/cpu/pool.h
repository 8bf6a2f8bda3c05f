// The thread pool all operations share: a parallel loop over chunks claimed one at a time.
//
// Who computes a chunk never changes its result (every output element is computed by one thread
// in a fixed order), so chunks are claimed dynamically: a core that is taken away by another
// process, or a worker still asleep, then costs its share of the speed and not a stall.
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
