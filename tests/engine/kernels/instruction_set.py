"""Which instruction set the CPU's kernels use, changed while the process runs."""

from __future__ import annotations

from engine.kernels.cpu import library


def force_isa(name: str) -> bool:
    """Switch to another instruction set; False when this CPU lacks it."""
    return bool(library.load().cortexd_force_isa(name.encode()) == 0)
