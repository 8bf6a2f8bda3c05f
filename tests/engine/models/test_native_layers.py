"""The native operations one by one give what the torch layers give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.models.decoder import Decoder
from engine.models.native_layers import native_layers
from tests.engine.checkpoints import load_engine, make_oracle, random_prompt, save_oracle
from tests.engine.driving import generate, max_difference, record

TOLERANCE = 1e-4


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {"head_dim": 16}),
        ("qwen2", {"hidden_size": 96}),
        ("qwen3", {}),
    ],
)
def test_native_layers_equal_the_reference(
    kind: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """Chunked prefill and decode, from a model of which every step could also be one call."""
    files = save_oracle(make_oracle(kind, **fields), tmp_path / "model")
    reference, native = load_engine(files, backend="reference"), load_engine(files)
    model = native.model
    assert isinstance(model, Decoder)
    model._native, model.native_layers = None, native_layers(model)
    assert model.backend_name == "native layers"
    found = []
    for engine in (reference, native):
        recorder = record(engine)
        tokens = generate(engine, random_prompt(45), max_tokens=5, ignore_eos=True)
        found.append((tokens, recorder.logits))
    assert found[0][0] == found[1][0]
    assert max(map(max_difference, found[0][1], found[1][1])) < TOLERANCE


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_5_text"])
def test_models_with_other_layers_keep_the_torch_ones(kind: str, tmp_path: Path) -> None:
    """Experts and linear attention have no native operation yet."""
    model = load_engine(save_oracle(make_oracle(kind), tmp_path / "model")).model
    assert isinstance(model, Decoder)
    assert model.native_layers is None
