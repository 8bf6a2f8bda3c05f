"""Native CPU kernels: quantised matrix products behind a plain C interface.

Used by `engine.layers`; `status()` is shown at start and in `cortexd status`. Without a compiler
and without a built library `available()` is False, and the callers run their torch reference.
"""

from engine.kernels.cpu.library import available, num_threads, set_num_threads, status
from engine.kernels.cpu.linear import PackedLinear, linear, pack

__all__ = [
    "PackedLinear",
    "available",
    "linear",
    "num_threads",
    "pack",
    "set_num_threads",
    "status",
]
