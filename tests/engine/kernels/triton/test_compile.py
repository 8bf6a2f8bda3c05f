"""The kernels compile for GPUs that are not here, and fit into their shared memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# KiB of one program, by compute capability (CUDA programming guide, table of technical limits).
SHARED_KIB = {80: 163, 89: 99, 90: 227}
NUM_KERNELS = 19


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("capability", "dtype"), [(80, "bfloat16"), (89, "bfloat16"), (90, "bfloat16"), (89, "float32")]
)
def test_all_kernels_compile_and_fit(capability: int, dtype: str) -> None:
    """For Ampere, Ada and Hopper: Triton's own compiler and assembler need no device."""
    module = "tests.engine.kernels.triton.compile_kernels"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", module, str(capability), dtype],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [(name, int(size)) for name, size in map(str.split, done.stdout.splitlines())]
    assert len({name for name, _ in compiled}) >= NUM_KERNELS
    limit = SHARED_KIB[capability] * 1024
    assert [kernel for kernel in compiled if kernel[1] > limit] == []
