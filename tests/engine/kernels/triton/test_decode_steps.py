"""Decode steps from static buffers, started ahead of their results, against the plain engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cortexd.models import ModelFiles
from engine.cache.slot_pool import NULL_SLOT
from engine.decode_steps import BUCKETS, DecodeSteps, Flight
from engine.engine import Engine
from engine.scheduling.step_plan import PlannedRow
from tests.engine.checkpoints import load_engine, make_oracle, random_prompt, save_oracle
from tests.engine.doubles import make_submit
from tests.engine.driving import OWNER, Outcome, collect, run_to_end
from tests.engine.kernels.triton.cases import DEVICE
from tests.engine.kernels.triton.test_engine import HYBRID, SMALL

PROMPTS = [random_prompt(length) for length in (2, 6, 7)]
FIELDS: list[dict[str, Any]] = [
    {"max_tokens": 8, "ignore_eos": True},
    {"max_tokens": 3, "temperature": 1.0, "seed": 3, "ignore_eos": True},
    {"max_tokens": 8, "temperature": 0.8, "top_k": 20, "seed": 4, "ignore_eos": True},
]


@pytest.fixture(scope="module", params=["llama", "qwen3_5", "qwen3_moe"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """A dense model, a hybrid, and one with experts."""
    fields = HYBRID if request.param == "qwen3_5" else SMALL
    oracle = make_oracle(request.param, **fields)
    return save_oracle(oracle, tmp_path_factory.mktemp("steps") / request.param)


def load(files: ModelFiles, backend: str = "triton") -> Engine:
    return load_engine(files, backend=backend, device=DEVICE.type)


def submit(engine: Engine) -> None:
    for number, prompt in enumerate(PROMPTS):
        engine.submit(OWNER, make_submit(prompt, number, **FIELDS[number]))


def tokens(outcomes: dict[int, Outcome]) -> list[list[int]]:
    return [outcomes[number].token_ids for number in range(len(PROMPTS))]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Note each decode step: its number of rows, and whether it was started ahead."""
    noted: list[tuple[int, bool]] = []
    launch: Callable[..., Flight] = DecodeSteps.launch

    def noting(self: DecodeSteps, rows: list[PlannedRow], after: Flight | None = None) -> Flight:
        noted.append((len(rows), after is not None))
        return launch(self, rows, after)

    monkeypatch.setattr(DecodeSteps, "launch", noting)
    return noted


def test_steps_ahead_give_the_same_tokens(
    files: ModelFiles, launches: list[tuple[int, bool]]
) -> None:
    """Drawn and greedy rows, beyond the ends of blocks, with a row that ends before the others."""
    expected_engine = load(files, "reference")
    submit(expected_engine)
    expected = tokens(run_to_end(expected_engine))
    assert not launches
    engine = load(files)
    submit(engine)
    assert tokens(run_to_end(engine)) == expected
    assert (3, True) in launches
    assert (2, True) in launches


def test_row_that_stops_or_is_cancelled_harms_no_other(files: ModelFiles) -> None:
    """The step that was started ahead computed one token too many for both."""
    engine = load(files, "reference")
    submit(engine)
    expected = tokens(run_to_end(engine))
    engine = load(files)
    for number, prompt in enumerate(PROMPTS):
        stop = {"stop_token_ids": [expected[2][3]]} if number == 2 else {}
        engine.submit(OWNER, make_submit(prompt, number, **{**FIELDS[number], **stop}))
    outcomes = {number: Outcome() for number in range(len(PROMPTS))}
    while not outcomes[1].token_ids:
        collect(outcomes, engine.step())
    engine.cancel(OWNER, 1)
    run_to_end(engine, outcomes)
    assert outcomes[0].token_ids == expected[0]
    assert outcomes[1].finish_reason == "cancelled"
    assert outcomes[2].token_ids == expected[2][: expected[2].index(expected[2][3])]
    assert outcomes[2].finish_reason == "stop"


def test_padding_rows_write_to_null_block_and_slot_only(files: ModelFiles) -> None:
    """Three rows in a bucket of four: everything that nobody holds stays as it was."""
    engine = load(files)
    submit(engine)
    while engine.scheduler.waiting or any(s.num_uncomputed > 1 for s in engine.scheduler.running):
        engine.step()
    assert len(engine.scheduler.running) not in BUCKETS
    held = {block for s in engine.scheduler.running for block in s.block_table}
    blocks, states = engine.cache.blocks, engine.cache.states
    before = blocks.clone()
    pool = engine.scheduler.pool
    free = [block for block in range(1, pool.num_blocks) if not pool.is_held(block)]
    slots = {s.state_slot for s in engine.scheduler.running} | {NULL_SLOT}
    kept = None if states is None else states.recurrent.clone()
    engine.step()
    grown = {block for s in engine.scheduler.running for block in s.block_table} - held
    untouched = [block for block in free if block not in grown]
    assert untouched
    assert torch.equal(blocks[:, untouched].nan_to_num(), before[:, untouched].nan_to_num())
    if states is not None and kept is not None:
        others = [slot for slot in range(states.recurrent.shape[1]) if slot not in slots]
        assert torch.equal(states.recurrent[:, others], kept[:, others])
        assert torch.isfinite(states.recurrent).all()


@pytest.mark.gpu
def test_captured_steps_equal_the_reference(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket's second step is captured; from then on it is replayed."""
    replays = []
    replay = torch.cuda.CUDAGraph.replay

    def noting(graph: torch.cuda.CUDAGraph) -> None:
        replays.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", noting)
    expected, engine = load(files, "reference"), load(files)
    submit(expected)
    submit(engine)
    assert tokens(run_to_end(engine)) == tokens(run_to_end(expected))
    assert len(replays) > len(set(replays)) > 1
