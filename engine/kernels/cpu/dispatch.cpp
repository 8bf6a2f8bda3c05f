// Picks the instruction set. __builtin_cpu_supports asks the CPU and the operating system.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace cortexd {
namespace {

#if defined(__x86_64__)
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}
// Every CPU with AVX2 has F16C; FMA is asked for because a hypervisor may hide it.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

const Kernels* avx512() {
    static const Kernels set = with_tiles(kAvx512Kernels);
    return &set;
}

const Kernels* avx512_bf16() {
    static const Kernels set = with_bf16(*avx512());
    return &set;
}
#endif

// The sets that this CPU runs, the best first; ends with null.
struct Sets {
    const Kernels* sets[5] = {};

    Sets() {
        int count = 0;
#if defined(__x86_64__)
        if (has_avx512() && __builtin_cpu_supports("avx512bf16")) sets[count++] = avx512_bf16();
        if (has_avx512()) sets[count++] = avx512();
        if (has_avx2()) sets[count++] = &kAvx2Kernels;
#endif
        sets[count] = &kPortableKernels;
    }
};

const Sets& supported() {
    static const Sets sets;
    return sets;
}

std::atomic<const Kernels*> active{nullptr};

}  // namespace

const Kernels& kernels() {
    const Kernels* set = active.load(std::memory_order_acquire);
    if (set == nullptr) {
        set = supported().sets[0];
        active.store(set, std::memory_order_release);
    }
    return *set;
}

bool force_kernels(const char* name) {
    for (const Kernels* const* set = supported().sets; *set != nullptr; ++set) {
        if (std::strcmp((*set)->name, name) == 0) {
            active.store(*set, std::memory_order_release);
            return true;
        }
    }
    return false;
}

}  // namespace cortexd
