"""What `bench.load` starts: a process that loads a file twice and tells how long it took."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest

from bench import load_side
from cortexd.models import ModelSpec, RopeSpec
from tests.engine.model_files import random_dense, write_gguf

SPEC = ModelSpec(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    rms_norm_eps=1e-6,
    max_position_embeddings=64,
    rope=RopeSpec(theta=10000.0),
)


def test_side_prints_two_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seconds and CPU seconds of each."""
    tensors = {
        name: (tensor.numpy(), gguf.GGMLQuantizationType.F32)
        for name, tensor in random_dense(SPEC).items()
    }
    write_gguf(tmp_path / "m.gguf", SPEC, tensors)
    monkeypatch.setattr("sys.argv", ["load_side", str(tmp_path / "m.gguf"), "1"])
    assert load_side.main() == 0
    loads = json.loads(capsys.readouterr().out)
    assert len(loads) == 2
    assert all(seconds > 0 for load in loads for seconds in load)
