// The kernels for one instruction set; build.py compiles each such file with its own flags.
#include "vec_avx512.h"

#include "linear_kernel.h"

namespace cortexd {

const Kernels kAvx512Kernels = {"avx512", quantize<Avx512>, multiply_groups<Avx512>};

}  // namespace cortexd
