// The kernels for one instruction set; build.py compiles each such file with its own flags.
#include "vec_avx2.h"

#include "kernel_set.h"

namespace cortexd {

const Kernels kAvx2Kernels = kernel_set<Avx2>("avx2");

}  // namespace cortexd
