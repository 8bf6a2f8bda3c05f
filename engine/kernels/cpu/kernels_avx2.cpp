// The kernels for one instruction set; build.py compiles each such file with its own flags.
#include "vec_avx2.h"

#include "linear_kernel.h"

namespace cortexd {

const Kernels kAvx2Kernels = {"avx2", quantize<Avx2>, multiply_groups<Avx2>};

}  // namespace cortexd
