"""The loaded kernel library of this process, or the reason why there is none.

Used by the other modules of this package. State: one library per process, loaded on first use;
its threads belong to it. Failure rule: no library is a normal state with a one-line reason; a wrong
environment variable is a `ConfigError`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from typing import Final

from cortexd.errors import ConfigError
from engine.kernels.cpu import build

ISA_ENV: Final = "CORTEXD_CPU_ISA"
ISA_NAMES: Final = ("avx512bf16", "avx512", "avx2", "portable")


class Unavailable(Exception):
    """There is no native library; the text says why in one line."""


_POINTER: Final = ctypes.c_void_p
_SIZE: Final = ctypes.c_int64
_FLOAT: Final = ctypes.c_float
_SIGNATURES: Final[dict[str, tuple[list[type], type | None]]] = {
    "cortexd_isa": ([], ctypes.c_char_p),
    "cortexd_force_isa": ([ctypes.c_char_p], ctypes.c_int),
    "cortexd_set_num_threads": ([ctypes.c_int], None),
    "cortexd_num_threads": ([], ctypes.c_int),
    "cortexd_packed_bytes": ([ctypes.c_int32, _SIZE, _SIZE], _SIZE),
    "cortexd_pack": ([ctypes.c_int32, _POINTER, _SIZE, _SIZE, _POINTER], ctypes.c_int),
    "cortexd_linear": ([_POINTER, _POINTER, _SIZE, _POINTER], ctypes.c_int),
    "cortexd_rms_norm": ([_POINTER, _POINTER, _FLOAT, _SIZE, _SIZE, _POINTER], None),
    "cortexd_silu_mul": ([_POINTER, _SIZE, _SIZE, _POINTER], None),
    "cortexd_rope_and_kv_write": (
        [
            *(_POINTER, _POINTER, _SIZE, _POINTER),  # shape, qkv, num_tokens, positions
            *(_POINTER, _SIZE, _FLOAT),  # inverse frequencies, half, scale
            *(_POINTER, _FLOAT, _POINTER, _POINTER),  # head norm, eps, slots, cache layer
        ],
        ctypes.c_int,
    ),
    "cortexd_attend": (
        [_POINTER, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _POINTER],
        ctypes.c_int,
    ),
    "cortexd_decoder_step": ([_POINTER, _POINTER], ctypes.c_int),
    "cortexd_barrier": (
        # words, rank, world size, round, spins, microseconds
        [_POINTER, ctypes.c_int, ctypes.c_int, ctypes.c_uint32, ctypes.c_int, _SIZE],
        ctypes.c_int,
    ),
}


@functools.cache
def _load() -> ctypes.CDLL | str:
    wanted = os.environ.get(ISA_ENV, "")
    if wanted not in ("", "off", *ISA_NAMES):
        raise ConfigError(
            f'{ISA_ENV} is "{wanted}"; allowed: {", ".join(ISA_NAMES)}, off, or unset for the best'
        )
    if wanted == "off":
        return f"off by {ISA_ENV}"
    if not sys.platform.startswith("linux"):
        return f"not supported on {sys.platform}"
    try:
        path = build.find_or_build()
        library = ctypes.CDLL(str(path))
    except (build.BuildError, OSError) as error:
        return str(error)
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = result
    if wanted and library.cortexd_force_isa(wanted.encode()) != 0:
        raise ConfigError(f'{ISA_ENV} is "{wanted}", which this CPU does not have')
    library.cortexd_set_num_threads(len(os.sched_getaffinity(0)))
    return library


def load() -> ctypes.CDLL:
    """Return the library, compiling it first when needed (some seconds, once per user).

    Raises: Unavailable; ConfigError for a wrong CORTEXD_CPU_ISA.
    """
    library = _load()
    if isinstance(library, str):
        raise Unavailable(library)
    return library


def available() -> bool:
    """Tell whether native kernels run in this process."""
    return not isinstance(_load(), str)


def status() -> str:
    """Say in one line which path is active, or why the torch reference runs instead."""
    library = _load()
    if isinstance(library, str):
        return f"cpu kernels: torch reference ({library})"
    return f"cpu kernels: native {isa()}, {num_threads()} threads"


def isa() -> str:
    """Return the active instruction set, one of `ISA_NAMES`."""
    name: bytes = load().cortexd_isa()
    return name.decode()


def set_num_threads(count: int) -> None:
    """Use `count` threads, the caller's included (default: the CPUs this process may use)."""
    assert count >= 1, f"{count} threads"
    load().cortexd_set_num_threads(count)


def num_threads() -> int:
    """Return how many threads an operation uses at most."""
    return int(load().cortexd_num_threads())
