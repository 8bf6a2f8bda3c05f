"""A model split over several ranks computes what the whole one computes."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from cortexd.models import ModelFiles
from engine.engine import Engine
from tests.engine.checkpoints import make_oracle, random_prompt
from tests.engine.doubles import make_submit
from tests.engine.driving import OWNER, Outcome, collect, max_difference, record, run_to_end
from tests.engine.tp.ranks import engine_of, saved

TOLERANCE = 1e-4
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    # 4 query heads, 2 KV heads: two ranks split the KV heads, four share them.
    "llama": ("llama", {}, (2, 4)),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, (2,)),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}, (2,)),
    "qwen2": ("qwen2", {}, (2,)),
    "qwen3": ("qwen3", {}, (2, 4)),
    "qwen3-three": ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 3}, (3,)),
    "qwen3-one-kv": ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 1}, (3,)),
}


def _files(name: str, folder: Path) -> ModelFiles:
    kind, fields, _ = CASES[name]
    fields = {"num_attention_heads": 4, "intermediate_size": 96, **fields}
    return saved(folder / "model", make_oracle(kind, **fields))


def _run(engine: Engine) -> tuple[dict[int, list[int]], list[torch.Tensor]]:
    """Run chunked prefill, decode, joins and a cancellation; return tokens and logits."""
    recorder = record(engine)
    outcomes: dict[int, Outcome] = defaultdict(Outcome)
    for sequence_id, length in enumerate([3, 45, 17], start=1):
        engine.submit(OWNER, make_submit(random_prompt(length), sequence_id, max_tokens=6))
    for _ in range(3):
        collect(outcomes, engine.step())
    engine.submit(OWNER, make_submit(random_prompt(9), 4, max_tokens=5))
    engine.submit(OWNER, make_submit(random_prompt(20), 5, max_tokens=50))
    collect(outcomes, engine.step())
    engine.cancel(OWNER, 5)
    run_to_end(engine, outcomes)
    tokens = {number: outcome.token_ids for number, outcome in outcomes.items() if number != 5}
    return tokens, recorder.logits


@pytest.mark.parametrize(
    ("name", "world_size"),
    [(name, size) for name, (_, _, sizes) in CASES.items() for size in sizes],
)
def test_split_model_gives_the_whole_ones_tokens_and_logits(
    name: str, world_size: int, tmp_path: Path
) -> None:
    """Chunked prefill, decode, a batch with joins and leaves: equal in float32."""
    files = _files(name, tmp_path)
    with engine_of(files, 1) as whole:
        tokens, logits = _run(whole)
    with engine_of(files, world_size) as split:
        split_tokens, split_logits = _run(split)
    assert split_tokens == tokens
    assert len(split_logits) == len(logits)
    pairs = zip(split_logits, logits, strict=True)
    assert max(max_difference(left, right) for left, right in pairs) < TOLERANCE


def test_preempted_sequence_of_a_split_model_ends_the_same(tmp_path: Path) -> None:
    """Blocks run out: what is computed again on both ranks is the same text."""
    files = _files("qwen3", tmp_path)
    prompts = [random_prompt(40, seed) for seed in range(4)]
    outcomes = []
    for world_size in (1, 2):
        with engine_of(files, world_size, max_model_len=64) as engine:
            # Room for two of the four sequences at their full length.
            engine.scheduler.pool.allocate(engine.scheduler.pool.num_free - 14, after=0)
            for number, prompt in enumerate(prompts, start=1):
                engine.submit(OWNER, make_submit(prompt, number, max_tokens=20))
            found: dict[int, Outcome] = defaultdict(Outcome)
            while engine.has_work:
                collect(found, engine.step())
            outcomes.append({number: outcome.token_ids for number, outcome in found.items()})
            assert engine.scheduler.num_preemptions > 0
    assert outcomes[0] == outcomes[1]
