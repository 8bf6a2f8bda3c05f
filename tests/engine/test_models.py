"""Every architecture against transformers: logits within 1e-4 in float32, equal greedy text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

from engine.preflight import inspect
from tests.engine.checkpoints import (
    LINEAR_ROPE,
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
# One token, within a chunk of 32, exactly one, just over, beyond two chunks, and beyond two chunks
# of 64, which the delta rule takes at once.
PROMPT_LENGTHS = (1, 7, 32, 33, 75)
LONG = 140

CASES: dict[str, dict[str, Any]] = {
    "llama-untied": {"kind": "llama", "tie_word_embeddings": False},
    "llama-tied": {"kind": "llama", "tie_word_embeddings": True, "seed": 1},
    "llama-llama3-rope": {"kind": "llama", "rope_parameters": LLAMA3_ROPE, "seed": 2},
    "llama-yarn-rope": {"kind": "llama", "rope_parameters": YARN_ROPE, "seed": 3},
    "llama-linear-rope": {"kind": "llama", "rope_parameters": LINEAR_ROPE, "seed": 12},
    "llama-biases": {"kind": "llama", "attention_bias": True, "mlp_bias": True, "seed": 4},
    "llama-head-dim": {"kind": "llama", "head_dim": 12, "seed": 5},
    "qwen3-untied": {"kind": "qwen3", "tie_word_embeddings": False, "seed": 6},
    "qwen3-tied": {"kind": "qwen3", "tie_word_embeddings": True, "seed": 7},
    "qwen3-sharded": {"kind": "qwen3", "seed": 8, "max_shard_size": "30KB"},
    "qwen2-untied": {"kind": "qwen2", "seed": 13},
    "qwen2-tied-yarn": {
        "kind": "qwen2",
        "tie_word_embeddings": True,
        "rope_parameters": YARN_ROPE,
        "seed": 14,
    },
    "qwen3_moe-untied": {"kind": "qwen3_moe", "seed": 15},
    "qwen3_moe-unnormalized": {
        "kind": "qwen3_moe",
        "tie_word_embeddings": True,
        "norm_topk_prob": False,
        "seed": 16,
    },
    "qwen3_moe-some-layers-dense": {
        "kind": "qwen3_moe",
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [1],
        "attention_bias": True,
        "seed": 17,
    },
    "qwen3_moe-sharded": {"kind": "qwen3_moe", "seed": 18, "max_shard_size": "60KB"},
    "qwen3_5-untied": {"kind": "qwen3_5", "seed": 20},
    "qwen3_5-tied": {"kind": "qwen3_5", "tie_word_embeddings": True, "seed": 21},
    "qwen3_5-flat": {"kind": "qwen3_5_text", "seed": 22},
    "qwen3_5-llama3-rope": {
        "kind": "qwen3_5_text",
        "rope_parameters": {**LLAMA3_ROPE, "partial_rotary_factor": 0.5},
        "tie_word_embeddings": True,
        "seed": 23,
    },
    "qwen3_5-layer-types": {
        "kind": "qwen3_5",
        "layer_types": [*["full_attention", "linear_attention"] * 2, "full_attention"],
        "num_hidden_layers": 5,
        "attention_bias": True,
        "seed": 24,
    },
    "qwen3_5-one-group": {"kind": "qwen3_5", "linear_num_key_heads": 4, "seed": 25},
    "qwen3_5-sharded": {"kind": "qwen3_5", "seed": 26, "max_shard_size": "60KB"},
    "qwen3_next-untied": {"kind": "qwen3_next", "seed": 27},
    "qwen3_next-tied": {"kind": "qwen3_next", "tie_word_embeddings": True, "seed": 28},
    "qwen3_next-some-layers-dense": {"kind": "qwen3_next", "mlp_only_layers": [0], "seed": 29},
    "qwen3_5_moe-untied": {"kind": "qwen3_5_moe", "seed": 30},
    "qwen3_5_moe-tied": {"kind": "qwen3_5_moe", "tie_word_embeddings": True, "seed": 31},
    "qwen3_5_moe-flat": {"kind": "qwen3_5_moe_text", "seed": 32},
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
    lengths = (*PROMPT_LENGTHS, LONG) if inspect(files).linear_layers else PROMPT_LENGTHS
    for length in lengths:
        prompt = random_prompt(length)
        recorder.logits.clear()
        tokens = generate(engine, prompt, max_tokens=6, ignore_eos=True)
        assert max_difference(recorder.logits[0], oracle_logits(oracle, prompt)) < TOLERANCE
        assert tokens == oracle_greedy(oracle, prompt, tokens, 6)


def test_bfloat16_checkpoint_runs_in_float32_or_near_it_in_bfloat16(tmp_path: Path) -> None:
    """Float32 computing is exact on weights stored as bf16; in bfloat16 logits are rounded."""
    files = save_oracle(make_oracle("qwen3", seed=9).bfloat16(), tmp_path / "model")
    oracle = Qwen3ForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, attn_implementation="eager"
    )
    exact = load_engine(files, activations="exact")
    engine = load_engine(files, dtype="bfloat16")
    assert (engine.dtype_name, exact.dtype_name) == ("bfloat16", "float32")
    rounded, reference = record(engine), record(exact)
    prompt = random_prompt(40)
    generate(engine, prompt, max_tokens=1)
    generate(exact, prompt, max_tokens=1)
    assert max_difference(reference.logits[0], oracle_logits(oracle, prompt)) < TOLERANCE
    spread = float(reference.logits[0].std())
    assert max_difference(rounded.logits[0], reference.logits[0]) < 0.25 * spread


@pytest.mark.parametrize(("kind", "least"), [("qwen3_5", 0.98), ("qwen3_next", 0.9)])
def test_bfloat16_hybrid_stays_near_float32(kind: str, least: float, tmp_path: Path) -> None:
    """The state is float32 in a bfloat16 model; the rest rounds where transformers rounds.

    With experts, rounding now and then sends a token to another one.
    """
    oracle = make_oracle(kind, seed=33)
    files = save_oracle(oracle.bfloat16(), tmp_path / "model")
    exact, engine = load_engine(files), load_engine(files, dtype="bfloat16")
    assert engine.dtype_name == "bfloat16"
    assert engine.cache.states is not None
    assert engine.cache.states.recurrent.dtype == torch.float32
    rounded, reference = record(engine), record(exact)
    for length in (1, 100):
        prompt = random_prompt(length)
        generate(engine, prompt, max_tokens=1)
        generate(exact, prompt, max_tokens=1)
        theirs = oracle_logits(oracle, prompt)
        similarity = torch.cosine_similarity(rounded.logits[-1], theirs, dim=0)
        assert float(similarity) > least
        similarity = torch.cosine_similarity(rounded.logits[-1], reference.logits[-1], dim=0)
        assert float(similarity) > least
