"""A model split over several ranks computes what the whole one computes, in every way it can.

Every architecture and every way of computing, over gloo in one process: the logits of each sampled
token within 1e-4, the greedy tokens equal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from cortexd.models import ModelFiles
from engine.cache.state_cache import StateCache
from engine.engine import Engine
from tests.engine.checkpoints import make_oracle, random_prompt
from tests.engine.doubles import make_submit
from tests.engine.driving import OWNER, Outcome, collect, generate, max_difference, record
from tests.engine.tp.ranks import engine_of, saved

TOLERANCE = 1e-4
BROKEN = 1e-2
# With four ranks, two share each KV head and each K head of the linear attention.
EVEN = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
THREE = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 96}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
EVEN_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 8, **HYBRID}
THREE_LINEAR = {"linear_num_key_heads": 3, "linear_num_value_heads": 6, **HYBRID}
EXPERTS = {"moe_intermediate_size": 48}
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (EVEN, THREE),
    "qwen2": (EVEN, {**THREE, "num_attention_heads": 12, "hidden_size": 96}),
    "qwen3": (EVEN, THREE),
    "qwen3_moe": ({**EVEN, **EXPERTS}, {**THREE, **EXPERTS}),
    "qwen3_next": ({**EVEN, **EVEN_LINEAR, **EXPERTS}, {**THREE, **THREE_LINEAR, **EXPERTS}),
    "qwen3_5_text": ({**EVEN, **EVEN_LINEAR}, {**THREE, **THREE_LINEAR}),
    "qwen3_5_moe_text": ({**EVEN, **EVEN_LINEAR, **EXPERTS}, {**THREE, **THREE_LINEAR, **EXPERTS}),
}
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    **{f"{kind}-even": (kind, even, (2, 4)) for kind, (even, _) in FAMILIES.items()},
    **{f"{kind}-three": (kind, three, (3,)) for kind, (_, three) in FAMILIES.items()},
    "llama-tied": ("llama", {**EVEN, "tie_word_embeddings": True}, (2,)),
    "llama-bias": ("llama", {**EVEN, "attention_bias": True, "mlp_bias": True}, (2,)),
    "qwen3-one-kv": ("qwen3", {**THREE, "num_key_value_heads": 1}, (3,)),
    "qwen3_next-dense-layer": (
        "qwen3_next",
        {**EVEN, **EVEN_LINEAR, **EXPERTS, "mlp_only_layers": [1]},
        (2,),
    ),
}
# Four ranks on two cores are slow, so only these run every time.
FOUR_RANKS = ("llama-even", "qwen3_5_text-even")
Found = tuple[dict[int, list[int]], list[Tensor]]
WholeOf = Callable[[str], tuple[ModelFiles, dict[str, Found]]]


def _drain(engine: Engine, outcomes: dict[int, Outcome]) -> None:
    while engine.has_work:
        collect(outcomes, engine.step())


def _submit(engine: Engine, number: int, prompt: list[int], count: int) -> None:
    engine.submit(OWNER, make_submit(prompt, number, max_tokens=count, ignore_eos=True))


def _prefill_and_decode(engine: Engine, outcomes: dict[int, Outcome]) -> None:
    """One short prompt, in one pass."""
    _submit(engine, 1, random_prompt(30), 4)
    _drain(engine, outcomes)


def _chunked_prefill(engine: Engine, outcomes: dict[int, Outcome]) -> None:
    """A prompt of three chunks, the last one of a single token."""
    _submit(engine, 1, random_prompt(65, 1), 2)
    _drain(engine, outcomes)


def _joins_and_leaves(engine: Engine, outcomes: dict[int, Outcome]) -> None:
    """Sequences that come and go while others decode, and one that is cancelled."""
    for number, length in enumerate([3, 45, 17], start=1):
        _submit(engine, number, random_prompt(length, 2), 5)
    for _ in range(3):
        collect(outcomes, engine.step())
    _submit(engine, 4, random_prompt(9, 2), 4)
    _submit(engine, 5, random_prompt(20, 2), 50)
    collect(outcomes, engine.step())
    engine.cancel(OWNER, 5)
    _drain(engine, outcomes)
    del outcomes[5]


def _prefix_hit(engine: Engine, outcomes: dict[int, Outcome]) -> None:
    """A prompt that begins as one before, whose state a hybrid takes up from a snapshot."""
    before = engine.scheduler.prefix_cache.num_hit_tokens
    prompt = random_prompt(48, 3)
    generate(engine, prompt[:40], max_tokens=3, ignore_eos=True)
    generate(engine, random_prompt(11, 3), max_tokens=3, ignore_eos=True)
    _submit(engine, 1, prompt, 4)
    _submit(engine, 2, prompt[:41], 3)
    _drain(engine, outcomes)
    assert engine.scheduler.prefix_cache.num_hit_tokens - before >= 64


def _preemption(engine: Engine, outcomes: dict[int, Outcome]) -> None:
    """Two of three sequences begin, and only one has room for its full length."""
    pool = engine.scheduler.pool
    before = engine.scheduler.num_preemptions
    held = pool.allocate(pool.num_free - 9, after=0)
    for number in range(1, 4):
        _submit(engine, number, random_prompt(28, 3 + number), 12)
    _drain(engine, outcomes)
    pool.release(held)
    assert engine.scheduler.num_preemptions > before


WAYS: tuple[Callable[[Engine, dict[int, Outcome]], None], ...] = (
    _prefill_and_decode,
    _chunked_prefill,
    _joins_and_leaves,
    _prefix_hit,
    _preemption,
)


def _run(files: ModelFiles, world_size: int) -> dict[str, Found]:
    """Return the tokens and logits of every way, one after the other in one engine."""
    found: dict[str, Found] = {}
    with engine_of(files, world_size, max_model_len=128) as engine:
        recorder = record(engine)
        for way in WAYS:
            outcomes: dict[int, Outcome] = defaultdict(Outcome)
            recorder.logits = []
            way(engine, outcomes)
            tokens = {number: outcome.token_ids for number, outcome in outcomes.items()}
            found[way.__name__] = tokens, recorder.logits
    return found


def _files(name: str, folder: Path) -> ModelFiles:
    kind, fields, _ = CASES[name]
    return saved(folder / "model", make_oracle(kind, **{"num_hidden_layers": 2, **fields}))


def _difference(left: Found, right: Found) -> float:
    assert len(left[1]) == len(right[1])
    return max(max_difference(*pair) for pair in zip(left[1], right[1], strict=True))


@pytest.fixture(scope="module")
def whole_of(tmp_path_factory: pytest.TempPathFactory) -> WholeOf:
    """A case's files, and what one rank makes of them, computed once."""

    @cache
    def found(name: str) -> tuple[ModelFiles, dict[str, Found]]:
        files = _files(name, tmp_path_factory.mktemp("models"))
        return files, _run(files, 1)

    return found


@pytest.mark.parametrize(
    ("name", "world_size"),
    [
        pytest.param(name, size, marks=[] if size < 4 or name in FOUR_RANKS else pytest.mark.slow)
        for name, (_, _, sizes) in CASES.items()
        for size in sizes
    ],
)
def test_split_model_gives_the_whole_ones_tokens_and_logits(
    name: str,
    world_size: int,
    whole_of: WholeOf,
    record_property: Callable[[str, object], None],
) -> None:
    """Prefill, chunks, decode, a batch with joins and leaves, prefix hits, preemption."""
    files, whole = whole_of(name)
    for way, found in _run(files, world_size).items():
        difference = _difference(found, whole[way])
        record_property(way.strip("_"), f"{difference:.1e}")
        assert found[0] == whole[way][0], way
        assert difference < TOLERANCE, way


def test_workers_without_the_leaders_state_copies_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above fails when a snapshot is not taken up again."""
    files = _files("qwen3_5_text-even", tmp_path)
    whole = _run(files, 1)
    monkeypatch.setattr(StateCache, "copy", lambda *_: None)
    assert _difference(_run(files, 2)["_prefix_hit"], whole["_prefix_hit"]) > BROKEN
