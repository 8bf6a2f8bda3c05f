"""The scheduler, without torch: single decisions, and properties under random traffic."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexd import errors
from cortexd.settings import Engine as EngineSettings
from engine.cache.block_pool import BlockPool
from engine.cache.kv_room import KVRoom
from engine.scheduling import prefill_chunks
from engine.scheduling.prefill_chunks import MIN_PREFILL_CHUNK
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence, SequenceState
from engine.scheduling.step_plan import StepPlan
from tests.engine.doubles import make_sequence
from tests.engine.kv_model import KVModel

BLOCK_SIZE = 8
BLOCK_BYTES = 1000


def make_scheduler(num_blocks: int = 64, context: int = 256, **fields: Any) -> Scheduler:
    """Return a scheduler over a pool of `num_blocks` usable blocks of eight tokens.

    Without the prefix cache unless `fields` say otherwise: most tests repeat one token.
    """
    fields = {"max_num_batched_tokens": 32, "max_prefill_chunk": 16, "max_num_seqs": 4, **fields}
    fields = {"prefix_cache": False, **fields}
    room = KVRoom(BlockPool(num_blocks + 1), BLOCK_SIZE, BLOCK_BYTES)
    return Scheduler(EngineSettings(**fields), room, context)


def run_step(scheduler: Scheduler) -> StepPlan:
    """Plan and complete a step in which each sampling row yields one token."""
    plan = scheduler.plan()
    scheduler.complete(plan)
    for row in plan.rows:
        if row.samples:
            row.sequence.token_ids.append(7)
            if row.sequence.num_output_tokens >= row.sequence.max_tokens:
                scheduler.finish(row.sequence)
    return plan


def shape(plan: StepPlan) -> list[tuple[int, int, int]]:
    """Return (sequence id, start, number of tokens) of each row."""
    return [(row.sequence.sequence_id, row.start, row.num_tokens) for row in plan.rows]


def test_plan_long_prompt_is_cut_into_chunks_and_samples_with_the_last() -> None:
    """A prompt of 40 takes chunks of 16, 16 and 8; only the last one samples."""
    scheduler = make_scheduler()
    scheduler.submit(make_sequence([1] * 40))
    plans = [run_step(scheduler) for _ in range(4)]
    assert [shape(plan) for plan in plans] == [
        [(1, 0, 16)],
        [(1, 16, 16)],
        [(1, 32, 8)],
        [(1, 40, 1)],
    ]
    assert [plan.rows[0].samples for plan in plans] == [False, False, True, True]


def test_plan_decodes_come_first_and_bound_the_prefill() -> None:
    """A sequence joins while others decode; prefill beside decodes is one chunk at most."""
    scheduler = make_scheduler()
    scheduler.submit(make_sequence([1] * 4, sequence_id=1))
    run_step(scheduler)
    scheduler.submit(make_sequence([1] * 30, sequence_id=2))
    scheduler.submit(make_sequence([1] * 30, sequence_id=3))
    plan = run_step(scheduler)
    assert shape(plan) == [(1, 4, 1), (2, 0, 16)]
    assert plan.num_decodes == 1


def test_plan_without_decodes_fills_the_budget_with_several_prompts() -> None:
    """An idle engine prefills several prompts in one step; whole chunks only, in order."""
    scheduler = make_scheduler()
    for sequence_id, length in ((1, 12), (2, 12), (3, 12), (4, 2)):
        scheduler.submit(make_sequence([1] * length, sequence_id=sequence_id))
    assert shape(run_step(scheduler)) == [(1, 0, 12), (2, 0, 12)]
    assert shape(run_step(scheduler)) == [(1, 12, 1), (2, 12, 1), (3, 0, 12), (4, 0, 2)]


def test_plan_first_chunk_is_cut_when_no_step_could_hold_it_whole() -> None:
    """A chunk larger than what decodes leave of the budget still moves on."""
    scheduler = make_scheduler(max_num_batched_tokens=16, max_prefill_chunk=16)
    scheduler.submit(make_sequence([1] * 4, sequence_id=1))
    run_step(scheduler)
    scheduler.submit(make_sequence([1] * 40, sequence_id=2))
    assert shape(run_step(scheduler)) == [(1, 4, 1), (2, 0, 15)]


def run_beside_short_prompts(scheduler: Scheduler, long: Sequence) -> tuple[int, int]:
    """Submit a long prompt, and a short one each step; return steps and short answers by its end.

    Gives up after 200 steps.
    """
    scheduler.submit(long)
    num_short = 0
    for step in range(1, 200):
        scheduler.submit(make_sequence([1] * 16, max_tokens=1, sequence_id=step))
        num_short += any(
            row.sequence is not long and row.samples for row in run_step(scheduler).rows
        )
        if long.num_output_tokens:
            return step, num_short
    return 200, num_short


def test_long_prompt_and_short_ones_neither_starve() -> None:
    """Short prompts overtake a long one of ten chunks nine times; then it goes first."""
    scheduler = make_scheduler(max_num_batched_tokens=16, max_prefill_chunk=16, num_blocks=128)
    assert run_beside_short_prompts(scheduler, make_sequence([1] * 160)) == (19, 9)


def test_long_prompt_would_starve_without_aging(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: shortest first alone never comes to the long prompt."""
    monkeypatch.setattr(Scheduler, "_count_overtaken", lambda *_: None)
    scheduler = make_scheduler(max_num_batched_tokens=16, max_prefill_chunk=16, num_blocks=128)
    assert run_beside_short_prompts(scheduler, make_sequence([1] * 160))[0] == 200


def test_submit_beyond_seats_and_queue_raises_overloaded() -> None:
    """Seats do not count as queue places; one more than both is refused."""
    scheduler = make_scheduler(max_num_seqs=2, max_queue_depth=3)
    for sequence_id in range(5):
        scheduler.submit(make_sequence([1], sequence_id=sequence_id))
    with pytest.raises(errors.Overloaded, match=r"holds 3 requests.*max_queue_depth") as caught:
        scheduler.submit(make_sequence([1], sequence_id=9))
    assert caught.value.retriable


def test_plan_out_of_blocks_preempts_the_newest_which_keeps_its_tokens() -> None:
    """The newest gives way, waits at the head of the queue and is computed again."""
    scheduler = make_scheduler(num_blocks=5, context=40)
    old, new, later = (make_sequence([1] * 15, max_tokens=20, sequence_id=i) for i in (1, 2, 3))
    for sequence in (old, new, later):
        scheduler.submit(sequence)
    while new.num_preemptions == 0:
        run_step(scheduler)
    assert old.num_preemptions == 0
    assert new.state is SequenceState.WAITING
    assert (new.num_computed, new.block_table) == (0, [])
    assert new.num_output_tokens > 0
    assert list(scheduler.waiting) == [new, later]
    while scheduler.has_work:
        run_step(scheduler)
    assert [len(s.token_ids) for s in (old, new, later)] == [35, 35, 35]
    assert scheduler.pool.num_used == 0


def test_finish_frees_all_blocks_wherever_the_sequence_stands() -> None:
    """Running, waiting and finished sequences can all be finished."""
    scheduler = make_scheduler(max_num_seqs=1)
    running, waiting = make_sequence([1] * 20), make_sequence([1] * 20)
    scheduler.submit(running)
    scheduler.submit(waiting)
    run_step(scheduler)
    for sequence in (running, waiting, running):
        scheduler.finish(sequence)
    assert scheduler.pool.num_used == 0
    assert not scheduler.has_work


def test_reduce_halves_chunks_then_preempts_then_gives_a_sequence_up() -> None:
    """Out of memory: smaller chunks, fewer sequences, and at last one failure."""
    scheduler = make_scheduler(max_prefill_chunk=64, max_num_batched_tokens=128)
    first, second = make_sequence([1] * 100), make_sequence([1] * 100)
    scheduler.submit(first)
    scheduler.submit(second)
    assert scheduler.reduce(scheduler.plan()) is None
    plan = scheduler.plan()
    assert max(row.num_tokens for row in plan.rows) == 32
    assert scheduler.reduce(plan) is None
    plan = scheduler.plan()
    assert max(row.num_tokens for row in plan.rows) == MIN_PREFILL_CHUNK
    assert scheduler.reduce(plan) is None
    assert second.state is SequenceState.WAITING
    scheduler.finish(second)
    assert scheduler.reduce(scheduler.plan()) is first


def test_complete_many_clean_steps_restores_the_chunk_limit() -> None:
    """A chunk limit cut by an out-of-memory grows back."""
    scheduler = make_scheduler(max_prefill_chunk=32, num_blocks=128, context=1024)
    sequence = make_sequence([1] * 40, max_tokens=70)
    scheduler.submit(sequence)
    scheduler.reduce(scheduler.plan())
    for _ in range(66):
        run_step(scheduler)
    scheduler.finish(sequence)
    scheduler.submit(make_sequence([1] * 40))
    assert shape(run_step(scheduler)) == [(1, 0, 32)]


def test_repr_tells_the_load() -> None:
    """The status string names what runs, waits and is held."""
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.submit(make_sequence([1] * 9))
    scheduler.submit(make_sequence([1] * 9))
    run_step(scheduler)
    assert repr(scheduler) == "<Scheduler: 1 running, 1 waiting, <BlockPool: 2 used, 62 free>>"


def test_scored_prompt_yields_logits_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its chunks are cut to the bound; a second one that does not fit waits for the next step."""
    monkeypatch.setattr(prefill_chunks, "MAX_SCORED_TOKENS", 10)
    scheduler = make_scheduler()
    for sequence_id, wanted in ((1, 0), (2, 0), (3, -1)):
        prompt = make_sequence([1] * 14, sequence_id=sequence_id, num_prompt_logprobs=wanted)
        scheduler.submit(prompt)
    plans = [run_step(scheduler) for _ in range(4)]
    assert [shape(plan)[plan.num_decodes :] for plan in plans] == [
        [(3, 0, 14), (1, 0, 10)],
        [(1, 10, 4)],
        [(2, 0, 10)],
        [(2, 10, 4)],
    ]
    logits = [[row.num_logits for row in plan.rows[plan.num_decodes :]] for plan in plans]
    assert logits == [[1, 10], [4], [10], [4]]


def test_scored_prompt_takes_nothing_from_the_cache_before_it_is_scored() -> None:
    """A preempted one takes over what it has scored; an equal plain prompt all it can."""
    scheduler = make_scheduler(prefix_cache=True)
    prompt = [1, 2, 3, 4] * 8
    for index, wanted in enumerate([-1, 0, -1]):
        sequence = make_sequence(prompt, sequence_id=index, num_prompt_logprobs=wanted)
        scheduler.submit(sequence)
        run_step(scheduler)
        if wanted == 0:
            assert (sequence.num_computed, sequence.num_scored) == (16, 16)
            scheduler._preempt(sequence)
            run_step(scheduler)
            assert (sequence.num_cached_tokens, sequence.num_scored) == (0, 31)
        assert (sequence.num_cached_tokens > 0) == (index == 2)
        scheduler.finish(sequence)


# Lengths of prompt and answer, when it arrives, whether it begins like all others, and whether its
# prompt is scored.
arrivals = st.lists(
    st.tuples(
        st.integers(1, 60), st.integers(1, 40), st.integers(0, 3), st.booleans(), st.booleans()
    ),
    min_size=1,
    max_size=20,
)


@settings(max_examples=120)
@given(
    arrivals=arrivals,
    num_blocks=st.integers(13, 40),
    budget=st.integers(16, 48),
    chunk=st.integers(16, 64),
    seats=st.integers(1, 8),
    cancels=st.lists(st.tuples(st.integers(0, 19), st.integers(0, 60)), max_size=6),
    reductions=st.sets(st.integers(0, 60), max_size=3),
    errors_at=st.sets(st.integers(0, 60), max_size=2),
    max_scored=st.integers(1, 40),
    prefix_cache=st.booleans(),
)
def test_random_traffic_keeps_all_promises(max_scored: int, **traffic: Any) -> None:
    """No leak, no wrong share, budgets kept; all ends, is scored once, is overtaken rarely."""
    with mock.patch.object(prefill_chunks, "MAX_SCORED_TOKENS", max_scored):
        run_traffic(max_scored, **traffic)


def run_traffic(
    max_scored: int,
    *,
    arrivals: list[tuple[int, int, int, bool, bool]],
    num_blocks: int,
    budget: int,
    chunk: int,
    seats: int,
    cancels: list[tuple[int, int]],
    reductions: set[int],
    errors_at: set[int],
    prefix_cache: bool,
) -> None:
    """Let sequences arrive, be cancelled, run out of memory and fail, until all have ended."""
    scheduler = make_scheduler(
        num_blocks,
        context=100,
        max_num_batched_tokens=budget,
        max_prefill_chunk=chunk,
        max_num_seqs=seats,
        prefix_cache=prefix_cache,
    )
    model = KVModel(scheduler)
    todo = [
        (
            delay,
            make_sequence(
                _prompt(length, index, shared),
                max_tokens=output,
                sequence_id=index,
                num_prompt_logprobs=0 if scored else -1,
            ),
        )
        for index, (length, output, delay, shared, scored) in enumerate(arrivals)
    ]
    everything = [sequence for _, sequence in todo]
    cancelled: set[Sequence] = set()
    step = 0
    while todo or scheduler.has_work:
        while todo and todo[0][0] <= step % 4:
            scheduler.submit(todo.pop(0)[1])
        for index, at in cancels:
            if at == step and index < len(everything):
                sequence = everything[index]
                if sequence.state is not SequenceState.FINISHED and scheduler.has_work:
                    if any(sequence is waiting for _, waiting in todo):
                        continue
                    scheduler.finish(sequence)
                    cancelled.add(sequence)
        if scheduler.has_work:
            if step in reductions:
                victim = model.step_without_memory()
                if victim is not None:
                    scheduler.finish(victim)
                    cancelled.add(victim)
            elif step in errors_at:
                cancelled.update(model.step_with_an_error())
            else:
                model.step()
        step += 1
        assert step < 6000, "starvation"
    assert scheduler.pool.num_used == 0
    for (length, output, _, _, scored), sequence in zip(arrivals, everything, strict=True):
        if sequence not in cancelled:
            assert sequence.num_output_tokens == output
            positions = model.scored.get(sequence, [])
            assert positions == (list(range(length - 1)) if scored else [])
        shortest_chunk = min(MIN_PREFILL_CHUNK, max_scored) if scored else MIN_PREFILL_CHUNK
        assert sequence.num_overtaken <= -(-len(sequence.token_ids) // shortest_chunk)


def _prompt(length: int, index: int, is_shared: bool) -> list[int]:
    """Return tokens 1 to 5, of which the shared half of prompts begins alike."""
    own = 0 if is_shared else index
    return [1 + (own + position // 11) % 5 for position in range(length)]
