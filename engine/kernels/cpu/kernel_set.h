// Fills the table of kernels for one instruction set.
#pragma once

#include "attention_kernel.h"
#include "attention_tile.h"
#include "delta_net_kernel.h"
#include "elementwise_kernel.h"
#include "kernels.h"
#include "linear_kernel.h"

namespace cortexd {
namespace {

template <class Isa>
constexpr Kernels kernel_set(const char* name) {
    return {name,
            quantize<Isa>,
            multiply_groups<Isa>,
            nullptr,
            nullptr,
            nullptr,
            rms_norm<Isa>,
            silu_mul<Isa>,
            sigmoid_mul<Isa>,
            add_scaled<Isa>,
            rotate<Isa>,
            attend_partition<Isa>,
            attend_tile<Isa>,
            merge_partial<Isa>,
            finish_partial<Isa>,
            convolve<Isa>,
            delta_rule<Isa>};
}

}  // namespace
}  // namespace cortexd
