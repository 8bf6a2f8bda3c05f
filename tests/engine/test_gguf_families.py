"""GGUF of every family against transformers with the same, dequantised, weights.

The files are written as llama.cpp's converter does it: V heads in tiled order, norms as 1 + w, the
decay rate folded, experts stacked, projections split.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from cortexd.errors import BadModelFile
from cortexd.models import ModelFiles, ModelSpec
from engine.engine import Engine
from engine.preflight import inspect
from tests.engine.checkpoints import (
    Oracle,
    load_engine,
    oracle_greedy,
    oracle_logits,
    random_prompt,
)
from tests.engine.driving import generate, max_difference, record
from tests.engine.gguf_export import HYBRIDS, Exporter
from tests.engine.stored_models import make_model

TOLERANCE = 1e-4
LENGTHS = (1, 33, 140)


def largest_error(engine: Engine, oracle: Oracle) -> float:
    """Return the largest difference of last logits; greedy continuations must be equal."""
    recorder = record(engine)
    worst = 0.0
    for length in LENGTHS:
        prompt = random_prompt(length)
        recorder.logits.clear()
        tokens = generate(engine, prompt, max_tokens=5, ignore_eos=True)
        worst = max(worst, max_difference(recorder.logits[0], oracle_logits(oracle, prompt)))
        if worst < TOLERANCE:
            assert tokens == oracle_greedy(oracle, prompt, tokens, 5)
    return worst


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0, Type.Q4_1])
@pytest.mark.parametrize(
    "family", ["qwen2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"]
)
def test_family_equals_transformers(family: str, kind: Type, tmp_path: Path) -> None:
    """Every family, dense and quantised; experts and packed rows stay quantised."""
    oracle = make_model(family, seed=50 + int(kind), tie_word_embeddings=kind is Type.Q8_0)
    is_hybrid = family in HYBRIDS
    files = Exporter(oracle, kind).write(tmp_path / "m.gguf", has_drafts=is_hybrid)
    engine = load_engine(files, backend="reference")
    assert largest_error(engine, oracle) < TOLERANCE
    if kind is Type.Q8_0:
        stored = sum(Path(path).stat().st_size for path in files.weights)
        assert engine.memory_bytes - engine.cache.memory_bytes < 1.1 * stored


@pytest.mark.parametrize(("family", "least"), [("qwen3_5_text", 0.995), ("qwen3_next", 0.9)])
def test_native_kernels_stay_near_the_reference(family: str, least: float, tmp_path: Path) -> None:
    """The CPU's kernels round activations to 8 bits: logits point the same way.

    With experts, rounding now and then sends a token to another one.
    """
    oracle = make_model(family, seed=60)
    files = Exporter(oracle, Type.Q8_0).write(tmp_path / "m.gguf")
    engine = load_engine(files)
    recorder = record(engine)
    prompt = random_prompt(70)
    generate(engine, prompt, max_tokens=1)
    similarity = torch.cosine_similarity(recorder.logits[0], oracle_logits(oracle, prompt), dim=0)
    assert float(similarity) > least


def test_split_file_equals_the_whole_one(tmp_path: Path) -> None:
    """Tensors over several parts are one model; a lost or misplaced part is named."""
    oracle = make_model("qwen3_5_text", seed=61)
    files = Exporter(oracle, Type.Q8_0).write(tmp_path / "m.gguf", num_per_part=12)
    assert len(files.weights) > 3
    assert files.weights[0].endswith(f"-00001-of-{len(files.weights):05}.gguf")
    assert largest_error(load_engine(files, backend="reference"), oracle) < TOLERANCE
    lost = msgspec.structs.replace(files, weights=files.weights[:-1])
    with pytest.raises(BadModelFile, match=rf"one of {len(files.weights)} parts"):
        inspect(lost)
    swapped = msgspec.structs.replace(files, weights=(*files.weights[1:], files.weights[0]))
    with pytest.raises(BadModelFile, match=r"split\.no is 1, but it stands at 0"):
        inspect(swapped)
    twice = msgspec.structs.replace(files, weights=(*files.weights[:-1], files.weights[0]))
    with pytest.raises(BadModelFile, match=r"split\.no is 0"):
        inspect(twice)


def _grouped_heads(spec: ModelSpec) -> ModelSpec:
    assert spec.linear_attention is not None
    linear = msgspec.structs.replace(spec.linear_attention, has_tiled_heads=False)
    return msgspec.structs.replace(spec, linear_attention=linear)


def _unfolded(spec: ModelSpec) -> ModelSpec:
    return msgspec.structs.replace(spec, has_folded_weights=False)


def _unnormalised(spec: ModelSpec) -> ModelSpec:
    assert spec.moe is not None
    return msgspec.structs.replace(
        spec, moe=msgspec.structs.replace(spec.moe, norm_topk_prob=False)
    )


@pytest.mark.parametrize("break_it", [_grouped_heads, _unfolded, _unnormalised])
def test_each_transform_matters(
    break_it: Callable[[ModelSpec], ModelSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one of the readings above the comparison fails."""
    oracle = make_model("qwen3_5_moe_text", seed=62)
    files: ModelFiles = Exporter(oracle, Type.F32).write(tmp_path / "m.gguf")
    monkeypatch.setattr("tests.engine.checkpoints.inspect", lambda files: break_it(inspect(files)))
    error = largest_error(load_engine(files), oracle)
    assert not error < 1e-2


torch.set_num_threads(1)
