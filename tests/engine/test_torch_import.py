"""The quick import of torch, in a process of its own, since this one has torch already."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import sys
import engine.torch_import
assert "torch" in sys.modules
assert "torch._meta_registrations" not in sys.modules
assert "torch._decomp" not in sys.modules, "the import was not spared"

import torch
assert torch.equal(torch.ones(2, 3) @ torch.ones(3, 2), torch.full((2, 2), 3.0))

import torch._meta_registrations as kernels
assert kernels.__file__.endswith("_meta_registrations.py")
assert torch.empty(3, 4, device="meta").cumsum(0).shape == (3, 4)
"""


def test_tracing_kernels_are_imported_only_when_somebody_asks_for_them() -> None:
    """Nothing of them is loaded with torch; later the real module can be imported and works."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
