"""bfloat16 on a CPU: as near to float32 as transformers in bfloat16, and rounded where it rounds.

`test_cuda.py` does the first on a device with both backends.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.exactness import ARCHITECTURES
from engine.engine import Engine
from engine.layers import gated_delta_net
from engine.layers.delta_rule import DeltaInputs
from engine.layers.gated_delta_net import GatedDeltaNet
from engine.layers.norm import ZeroCentredRMSNorm
from tests.engine.rounding import PROMPTS, Answers, answer
from tests.engine.stored_models import StoredModel, store_model

FORMATS = ["safetensors bf16", pytest.param("GGUF q8_0", marks=pytest.mark.slow)]
# The dense hybrid's distance to transformers in bfloat16 is 7e-6 here; the least that any of the
# faults below made of it is 1.5e-4.
SAME_ROUNDING = 5e-5


@pytest.mark.parametrize("stored_as", FORMATS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_engine_is_as_near_as_transformers(
    architecture: str, stored_as: str, tmp_path: Path
) -> None:
    """Distance to float32 and best tokens; what rounding costs is the model's nature."""
    model = store_model(architecture, stored_as, tmp_path / "model")
    answer(model.load(dtype="bfloat16"), model.oracle).check()


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> StoredModel:
    """A dense hybrid stored in bfloat16, on the torch path."""
    directory = tmp_path_factory.mktemp("bfloat16") / "model"
    return store_model("qwen3_5", "safetensors bf16", directory)


def test_hybrid_rounds_where_transformers_does(hybrid: StoredModel) -> None:
    """State, norms, gates and decay are float32 in both, through many small chunks."""
    assert _answer(hybrid).to_rounded < SAME_ROUNDING


def _round(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).float()


def _round_state(monkeypatch: pytest.MonkeyPatch) -> None:
    original = gated_delta_net.chunk_delta_rule

    def broken(inputs: DeltaInputs, state: Tensor) -> tuple[Tensor, Tensor]:
        out, state = original(inputs, state)
        return out, _round(state)

    monkeypatch.setattr(gated_delta_net, "chunk_delta_rule", broken)


def _round_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor) -> object:
        return DeltaInputs(query, key, value, _round(decay), beta)

    monkeypatch.setattr(gated_delta_net, "DeltaInputs", broken)


def _round_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    original = gated_delta_net._l2_normalized
    monkeypatch.setattr(gated_delta_net, "_l2_normalized", lambda heads: _round(original(heads)))


def _round_decay_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    original = GatedDeltaNet.__init__

    def broken(self: GatedDeltaNet, *args: object, decay_rate: Tensor, **parts: object) -> None:
        original(self, *args, decay_rate=_round(decay_rate), **parts)  # type: ignore[arg-type]

    monkeypatch.setattr(GatedDeltaNet, "__init__", broken)


def _round_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ZeroCentredRMSNorm.__init__

    def broken(self: ZeroCentredRMSNorm, factor: Tensor, eps: float) -> None:
        original(self, _round(factor), eps)

    monkeypatch.setattr(ZeroCentredRMSNorm, "__init__", broken)


@pytest.mark.parametrize(
    "break_it", [_round_state, _round_decay, _round_keys, _round_decay_rate, _round_norms]
)
def test_what_is_rounded_too_early_is_seen(
    break_it: Callable[[pytest.MonkeyPatch], None],
    hybrid: StoredModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The comparison above fails when one of its float32 parts is rounded."""
    break_it(monkeypatch)
    assert _answer(hybrid).to_rounded > SAME_ROUNDING


def _answer(model: StoredModel) -> Answers:
    engine: Engine = model.load(dtype="bfloat16", max_prefill_chunk=5)
    return answer(engine, model.oracle, PROMPTS[3:9])
