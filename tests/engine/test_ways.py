"""How a prompt is computed makes no difference, on dense and on hybrid models.

Each way is also run with its mechanism broken on purpose, and then must differ.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.engine import Engine
from tests.engine.checkpoints import (
    NATIVE_HYBRID,
    Oracle,
    load_engine,
    make_oracle,
    make_sharp_oracle,
    oracle_logits,
    save_oracle,
)
from tests.engine.driving import max_difference
from tests.engine.mutations import MUTATIONS
from tests.engine.ways import PROMPTS, WAYS, Load

TOLERANCE = 1e-4
BROKEN = 1e-2  # what a broken mechanism must differ by at least


@pytest.fixture(scope="module", params=["qwen3", "qwen3_5", "qwen3_5 native", "qwen3_5_moe native"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Oracle, Load]:
    """A dense model and the hybrid that is hardest on the delta rule; torch and native paths."""
    kind, _, path = request.param.partition(" ")
    fields = NATIVE_HYBRID if path else {}
    if kind == "qwen3_5":
        oracle = make_sharp_oracle(**fields)
    else:
        experts = {"shared_expert_intermediate_size": 64} if "moe" in kind else {}
        oracle = make_oracle(kind, seed=42, **fields, **experts)
    files = save_oracle(oracle, tmp_path_factory.mktemp("ways") / "model")

    def load(**fields: Any) -> Engine:
        engine = load_engine(files, backend="auto" if path else "reference", **fields)
        assert engine.backend_name == (path or "reference")
        with torch.inference_mode():
            # What nobody has written must not be read, and lies there from engines before.
            engine.cache.blocks.fill_(9.0)
        return engine

    return oracle, load


@pytest.mark.parametrize("way", WAYS)
def test_every_way_equals_transformers(way: str, model: tuple[Oracle, Load]) -> None:
    """One pass = any chunks = token by token = in a batch = in a used slot = after a restart."""
    oracle, load = model
    for name, prompt in PROMPTS.items():
        expected = oracle_logits(oracle, prompt)
        assert max_difference(WAYS[way](load, prompt), expected) < TOLERANCE, name


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_mechanism_is_seen(
    name: str, model: tuple[Oracle, Load], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above fails when the mechanism that it is about is broken."""
    oracle, load = model
    mutation = MUTATIONS[name]
    if not mutation.concerns(load()):
        return
    mutation.break_it(monkeypatch)
    prompt = PROMPTS["random"]
    logits = WAYS[mutation.way](load, prompt)
    assert not max_difference(logits, oracle_logits(oracle, prompt)) < BROKEN
