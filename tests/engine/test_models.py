"""Llama and Qwen3 against transformers: logits within 1e-4 in float32, equal greedy text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

from tests.engine.checkpoints import (
    LLAMA3_ROPE,
    YARN_ROPE,
    load_engine,
    make_oracle,
    oracle_greedy,
    oracle_logits,
    random_prompt,
    save_oracle,
)
from tests.engine.driving import generate, max_difference, record

TOLERANCE = 1e-4
# One token, within a chunk of 32, exactly one, just over, beyond two chunks.
PROMPT_LENGTHS = (1, 7, 32, 33, 75)

CASES: dict[str, dict[str, Any]] = {
    "llama-untied": {"kind": "llama", "tie_word_embeddings": False},
    "llama-tied": {"kind": "llama", "tie_word_embeddings": True, "seed": 1},
    "llama-llama3-rope": {"kind": "llama", "rope_parameters": LLAMA3_ROPE, "seed": 2},
    "llama-yarn-rope": {"kind": "llama", "rope_parameters": YARN_ROPE, "seed": 3},
    "llama-biases": {"kind": "llama", "attention_bias": True, "mlp_bias": True, "seed": 4},
    "llama-head-dim": {"kind": "llama", "head_dim": 12, "seed": 5},
    "qwen3-untied": {"kind": "qwen3", "tie_word_embeddings": False, "seed": 6},
    "qwen3-tied": {"kind": "qwen3", "tie_word_embeddings": True, "seed": 7},
    "qwen3-sharded": {"kind": "qwen3", "seed": 8, "max_shard_size": "30KB"},
}


@pytest.mark.parametrize("name", CASES)
def test_engine_equals_transformers(name: str, tmp_path: Path) -> None:
    """Last-position logits and the greedy continuation, for prompts of one to many chunks."""
    fields = dict(CASES[name])
    shard_size = fields.pop("max_shard_size", "1GB")
    oracle = make_oracle(fields.pop("kind"), **fields)
    files = save_oracle(oracle, tmp_path / name, max_shard_size=shard_size)
    assert (len(files.weights) > 1) == name.endswith("sharded")
    engine = load_engine(files)
    recorder = record(engine)
    for length in PROMPT_LENGTHS:
        prompt = random_prompt(length)
        recorder.logits.clear()
        tokens = generate(engine, prompt, max_tokens=6, ignore_eos=True)
        assert max_difference(recorder.logits[0], oracle_logits(oracle, prompt)) < TOLERANCE
        assert tokens == oracle_greedy(oracle, prompt, 6)


def test_bfloat16_checkpoint_runs_in_float32_or_near_it_in_bfloat16(tmp_path: Path) -> None:
    """Float32 computing is exact on weights stored as bf16; in bfloat16 logits are rounded."""
    files = save_oracle(make_oracle("qwen3", seed=9).bfloat16(), tmp_path / "model")
    oracle = Qwen3ForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, attn_implementation="eager"
    )
    exact = load_engine(files)
    engine = load_engine(files, dtype="bfloat16")
    assert (engine.dtype_name, exact.dtype_name) == ("bfloat16", "float32")
    rounded, reference = record(engine), record(exact)
    prompt = random_prompt(40)
    generate(engine, prompt, max_tokens=1)
    generate(exact, prompt, max_tokens=1)
    assert max_difference(reference.logits[0], oracle_logits(oracle, prompt)) < TOLERANCE
    spread = float(reference.logits[0].std())
    assert max_difference(rounded.logits[0], reference.logits[0]) < 0.25 * spread
