// The kernels for one instruction set; build.py compiles each such file with its own flags.
#include "vec_avx512.h"

#include "kernel_set.h"

namespace cortexd {

const Kernels kAvx512Kernels = kernel_set<Avx512>("avx512");

}  // namespace cortexd
