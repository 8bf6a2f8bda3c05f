// Picks the instruction set. __builtin_cpu_supports asks the CPU and the operating system.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace cortexd {
namespace {

bool is_supported(const Kernels& set) {
#if defined(__x86_64__)
    if (&set == &kAvx512Kernels) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni");
    }
    // Every CPU with AVX2 has F16C; FMA is asked for because a hypervisor may hide it.
    if (&set == &kAvx2Kernels) {
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    }
#endif
    return &set == &kPortableKernels;
}

constexpr const Kernels* kBestFirst[] = {
#if defined(__x86_64__)
    &kAvx512Kernels, &kAvx2Kernels,
#endif
    &kPortableKernels};

const Kernels* best() {
    for (const Kernels* set : kBestFirst) {
        if (is_supported(*set)) return set;
    }
    return &kPortableKernels;
}

std::atomic<const Kernels*> active{nullptr};

}  // namespace

const Kernels& kernels() {
    const Kernels* set = active.load(std::memory_order_acquire);
    if (set == nullptr) {
        set = best();
        active.store(set, std::memory_order_release);
    }
    return *set;
}

bool force_kernels(const char* name) {
    for (const Kernels* set : kBestFirst) {
        if (std::strcmp(set->name, name) == 0 && is_supported(*set)) {
            active.store(set, std::memory_order_release);
            return true;
        }
    }
    return false;
}

}  // namespace cortexd
