"""One compiled library for all tests, and each instruction set of this CPU in turn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine.kernels import cpu
from engine.kernels.cpu import library
from tests.engine.kernels.instruction_set import force_isa


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    torch.set_num_threads(1)
    assert cpu.available(), cpu.status()
    cpu.set_num_threads(2)
    best = library.isa()
    yield
    force_isa(best)


@pytest.fixture(params=library.ISA_NAMES)
def isa(request: pytest.FixtureRequest) -> str:
    """Force one instruction set; the best there is stands in for those this CPU lacks."""
    name: str = request.param
    if not force_isa(name):
        name = library.isa()
    return name
