"""Safetensors quantised while they are loaded: what a file of that type would compute."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type

from cortexd.errors import BadModelFile
from engine.preflight import inspect
from tests.engine.checkpoints import (
    load_engine,
    make_oracle,
    oracle_greedy,
    oracle_logits,
    random_prompt,
    save_oracle,
)
from tests.engine.driving import generate, max_difference, record
from tests.engine.stored_models import make_model, quantised, round_weights

LENGTHS = (1, 33, 140)


@pytest.mark.parametrize(
    ("family", "quant", "kind"),
    [
        ("qwen3", "q8_0", Type.Q8_0),
        ("qwen2", "q5_1", Type.Q5_1),
        ("qwen3_moe", "q4_0", Type.Q4_0),
        ("qwen3_next", "q8_0", Type.Q8_0),
        ("qwen3_5_text", "q4_1", Type.Q4_1),
        ("qwen3_5_moe_text", "q5_0", Type.Q5_0),
    ],
)
def test_equals_transformers_with_rounded_weights(
    family: str, quant: str, kind: Type, tmp_path: Path
) -> None:
    """Every family, every block type; what is named exact stays so, and memory shrinks."""
    oracle = make_model(family, seed=70)
    files = save_oracle(oracle, tmp_path / "m")
    dense = load_engine(files)
    engine = load_engine(quantised(files, quant), backend="reference")
    round_weights(oracle, kind)
    recorder = record(engine)
    for length in LENGTHS:
        prompt = random_prompt(length)
        recorder.logits.clear()
        tokens = generate(engine, prompt, max_tokens=5, ignore_eos=True)
        assert max_difference(recorder.logits[0], oracle_logits(oracle, prompt)) < 1e-4
        assert tokens == oracle_greedy(oracle, prompt, tokens, 5)
    weight_bytes = engine.memory_bytes - engine.cache.memory_bytes
    assert weight_bytes < 0.6 * (dense.memory_bytes - dense.cache.memory_bytes)


def test_tied_head_is_quantised_and_looked_up_exactly_on_the_native_path(tmp_path: Path) -> None:
    """With kernels the head is packed once, and rows are read from the file as they are."""
    oracle = make_model("qwen3", seed=71, tie_word_embeddings=True)
    engine = load_engine(quantised(save_oracle(oracle, tmp_path / "m"), "q8_0"))
    prompt = random_prompt(40)
    recorder = record(engine)
    generate(engine, prompt, max_tokens=1)
    expected = oracle_logits(oracle, prompt)
    similarity = torch.cosine_similarity(recorder.logits[0], expected, dim=0)
    assert float(similarity) > 0.997
    assert engine.dtype_name == "float32"


@pytest.mark.parametrize("quant", ["q4k", "q5k", "q6k"])
def test_k_types_stay_near_the_dense_model(quant: str, tmp_path: Path) -> None:
    """Rows of 256 take the type itself, others a smaller block; better types are nearer."""
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 288, "num_hidden_layers": 2}
    oracle = make_oracle("llama", seed=72, initializer_range=0.06, num_attention_heads=4, **sizes)
    engine = load_engine(quantised(save_oracle(oracle, tmp_path / "m"), quant), backend="reference")
    prompt = random_prompt(40)
    recorder = record(engine)
    generate(engine, prompt, max_tokens=1)
    expected = oracle_logits(oracle, prompt)
    similarity = torch.cosine_similarity(recorder.logits[0], expected, dim=0)
    assert float(similarity) > {"q4k": 0.95, "q5k": 0.985, "q6k": 0.995}[quant]


def test_rows_of_no_block_stay_dense_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A width that is no multiple of 32 is told, not refused, and computed exactly."""
    oracle = make_oracle("qwen3", seed=73, hidden_size=40, intermediate_size=50)
    files = quantised(save_oracle(oracle, tmp_path / "m"), "q8_0")
    with caplog.at_level(logging.WARNING, "cortexd.engine"):
        engine = load_engine(files, backend="reference")
    assert [record.getMessage() for record in caplog.records] == ["weights.kept_dense"]
    assert "self_attn.q_proj.weight" in str(caplog.records[0].__dict__)
    assert generate(engine, random_prompt(9), max_tokens=2)


def test_nan_in_a_weight_is_refused_by_name(tmp_path: Path) -> None:
    """A value that no block can hold names the file and the tensor."""
    oracle = make_model("qwen3", seed=74)
    with torch.no_grad():
        oracle.model.layers[1].mlp.down_proj.weight[3, 5] = torch.inf
    files = save_oracle(oracle, tmp_path / "m")
    inspect(files)
    with pytest.raises(BadModelFile, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN"):
        load_engine(quantised(files, "q8_0"))
