// The kernels for one instruction set; build.py compiles each such file with its own flags.
#include "vec_portable.h"

#include "linear_kernel.h"

namespace cortexd {

const Kernels kPortableKernels = {"portable", quantize<Portable>, multiply_groups<Portable>};

}  // namespace cortexd
