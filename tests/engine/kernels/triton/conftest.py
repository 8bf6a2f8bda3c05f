"""Kernels run compiled on CUDA where there is a device, and in Triton's interpreter elsewhere.

Triton decides for the interpreter when it is imported, which transformers does for other tests, and
the variable would reach the daemons they start. So without a device these tests are collected only
in a run of their own: `TRITON_INTERPRET=1 python -m pytest tests/engine/kernels/triton`, a part of
`make test`. Only test_compile, which starts processes of its own, is always there.
"""

from __future__ import annotations

import os

import torch

_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if _IS_INTERPRETED or torch.cuda.is_available() else ["test_[!c]*.py"]

torch.set_num_threads(1)
