"""Native CPU kernels behind a plain C interface: quantised products, and whole decoder steps.

Used by `engine.layers` and `engine.models`; `status()` is shown at start and in `cortexd status`.
Without a compiler and without a built library `available()` is False, and the callers run their
torch reference.
"""

from engine.kernels.cpu.barrier import Barrier
from engine.kernels.cpu.decoder import NativeBatch, NativeDecoder
from engine.kernels.cpu.library import available, num_threads, set_num_threads, status
from engine.kernels.cpu.linear import PackedLinear, linear, pack
from engine.kernels.cpu.native_weights import (
    NativeAttention,
    NativeDeltaNet,
    NativeExperts,
    NativeLayer,
    NativeMLP,
    NativeShape,
    NativeSharedExpert,
)
from engine.kernels.cpu.ops import (
    AttentionRow,
    Rotary,
    paged_attention,
    rms_norm,
    rope_and_kv_write,
    silu_mul,
)

__all__ = [
    "AttentionRow",
    "Barrier",
    "NativeAttention",
    "NativeBatch",
    "NativeDecoder",
    "NativeDeltaNet",
    "NativeExperts",
    "NativeLayer",
    "NativeMLP",
    "NativeShape",
    "NativeSharedExpert",
    "PackedLinear",
    "Rotary",
    "available",
    "linear",
    "num_threads",
    "pack",
    "paged_attention",
    "rms_norm",
    "rope_and_kv_write",
    "set_num_threads",
    "silu_mul",
    "status",
]
