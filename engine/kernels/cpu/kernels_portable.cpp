// The kernels for one instruction set; build.py compiles each such file with its own flags.
#include "vec_portable.h"

#include "kernel_set.h"

namespace cortexd {

const Kernels kPortableKernels = kernel_set<Portable>("portable");

}  // namespace cortexd
