"""Makes the engine of a daemon under test fail on request; Python imports it by this name.

With this folder on PYTHONPATH, what reads a step's logits first looks at the seeds of the step's
requests: some stand for a fault. Nothing in the product knows of it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

SHORT_OF_MEMORY = 666001  # a step of more tokens than MAX_TOKENS does not fit
OUT_OF_MEMORY = 666002  # no step fits
BUG = 666003
DEVICE_FAULT = 666004
MAX_TOKENS = 20
_MODULE = "engine.sampling.row_results"


def _raise_if_asked(rows: list[Any]) -> None:
    import torch

    num_tokens = sum(row.num_tokens for row in rows)
    for seed in [row.sequence.submit.seed for row in rows]:
        if seed == OUT_OF_MEMORY or (seed == SHORT_OF_MEMORY and num_tokens > MAX_TOKENS):
            raise torch.OutOfMemoryError("out of memory: told to be")
        if seed == BUG:
            raise ValueError("told to fail")
        if seed == DEVICE_FAULT:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        real = module.read_results

        def read_results(rows: list[Any], *arguments: Any) -> Any:
            _raise_if_asked(rows)
            return real(rows, *arguments)

        module.read_results = read_results  # type: ignore[attr-defined]


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.origin is not None
        spec.loader = _Loader(name, spec.origin)
        return spec


if __name__ == "sitecustomize":  # a test that takes the seeds from here imports another name
    sys.meta_path.insert(0, _Finder())
