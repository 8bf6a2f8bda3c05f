"""Who waits for KV memory, in bytes, for how long, and what it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from cortexd.errors import Overloaded, QueueTimeout
from cortexd.settings import Engine as EngineSettings
from engine.cache.block_pool import BlockPool
from engine.cache.kv_room import KVRoom
from engine.cache.slot_pool import SlotPool
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence
from tests.engine.checkpoints import load_engine, make_oracle, random_prompt, save_oracle
from tests.engine.doubles import make_sequence, make_submit
from tests.engine.driving import OWNER, collect, run_to_end
from tests.engine.driving import Outcome as Result

BLOCK_SIZE, BLOCK_BYTES, SLOT_BYTES = 8, 1000, 300


class Clock:
    """Time that the test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        """Return the time, seconds."""
        return self.now_s


def make_scheduler(clock: Clock, num_blocks: int = 10, num_slots: int = 0) -> Scheduler:
    """Return a scheduler of few blocks and, with slots, of a hybrid model."""
    settings = EngineSettings(max_num_seqs=4, max_queue_depth=2, kv_wait_s=30.0)
    slots = SlotPool(num_slots) if num_slots else None
    slot_bytes = SLOT_BYTES if num_slots else 0
    room = KVRoom(BlockPool(num_blocks + 1), BLOCK_SIZE, BLOCK_BYTES, slots, slot_bytes)
    return Scheduler(settings, room, num_blocks * BLOCK_SIZE, clock)


def run_step(scheduler: Scheduler) -> None:
    """Plan and complete a step in which each sampling row yields one token."""
    plan = scheduler.plan()
    scheduler.complete(plan)
    for row in plan.rows:
        if row.samples:
            row.sequence.token_ids.append(7)


def submit(scheduler: Scheduler, sequence_id: int, num_tokens: int) -> Sequence:
    """Submit a prompt that shares nothing with others."""
    sequence = make_sequence([sequence_id] * num_tokens, sequence_id=sequence_id, max_tokens=99)
    scheduler.submit(sequence)
    return sequence


def late(scheduler: Scheduler) -> dict[int, QueueTimeout]:
    """Return the errors of those who waited too long, by sequence."""
    return {sequence.sequence_id: error for sequence, error in scheduler.overdue()}


def test_who_waits_for_memory_too_long_is_told_what_it_lacks() -> None:
    """Needed, available and all bytes, the setting, who is before it, and what to do."""
    clock = Clock()
    scheduler = make_scheduler(clock)
    submit(scheduler, 1, 50)  # 7 of 10 blocks
    run_step(scheduler)
    submit(scheduler, 2, 39)  # 5 blocks
    submit(scheduler, 3, 9)  # would fit, and has to wait its turn
    run_step(scheduler)
    clock.now_s += 29.9
    assert not late(scheduler)
    clock.now_s += 0.2
    errors = late(scheduler)
    assert sorted(errors) == [2, 3]
    assert str(errors[2]) == (
        "request request-2 could not begin within 30 s (engine.kv_wait_s): it needs 5000 bytes of "
        "KV memory, 3000 of 10000 are free (engine.kv_cache_mib); 1 of at most 4 requests run and "
        "0 wait before it; retry later, or send a shorter prompt"
    )
    assert "needs 2000 bytes" in str(errors[3])
    assert "1 wait before it" in str(errors[3])
    assert errors[2].details == {
        "needed_bytes": 5000,
        "available_bytes": 3000,
        "limit_bytes": 10000,
    }
    assert errors[2].retry_after_s == 5.0


def test_hybrid_counts_its_states() -> None:
    """A recurrent state is part of what is needed, of what is free and of the limit."""
    clock = Clock()
    scheduler = make_scheduler(clock, num_slots=3)
    submit(scheduler, 1, 50)
    run_step(scheduler)
    submit(scheduler, 2, 39)
    clock.now_s += 31
    error = late(scheduler)[2]
    expected = {"needed_bytes": 5300, "available_bytes": 3600, "limit_bytes": 10900}
    assert error.details == expected


def test_room_that_a_running_prompt_still_needs_is_not_free() -> None:
    """Blocks are taken chunk by chunk, and promised to the whole prompt from the beginning."""
    clock = Clock()
    scheduler = make_scheduler(clock, num_blocks=200)
    submit(scheduler, 1, 1500)  # 188 blocks, of which the first chunk takes 64
    run_step(scheduler)
    assert scheduler.pool.num_used == 64
    submit(scheduler, 2, 100)
    clock.now_s += 31
    assert late(scheduler)[2].details["available_bytes"] == 12_000


def test_who_was_preempted_waits_on() -> None:
    """It has been promised an answer; only those who never began are given up."""
    clock = Clock()
    scheduler = make_scheduler(clock, num_blocks=8)
    old, new = submit(scheduler, 1, 20), submit(scheduler, 2, 20)
    while not new.num_preemptions:
        run_step(scheduler)
    submit(scheduler, 3, 20)
    clock.now_s += 31
    assert list(late(scheduler)) == [3]
    scheduler.finish(old)
    run_step(scheduler)
    assert new.num_computed


def test_full_queue_says_what_it_waits_for() -> None:
    """The bytes of all that wait, those that are free, and the bound."""
    scheduler = make_scheduler(Clock())
    submit(scheduler, 1, 50)
    run_step(scheduler)
    for sequence_id in (2, 3, 4, 5, 6):
        submit(scheduler, sequence_id, 39)
    with pytest.raises(Overloaded) as caught:
        submit(scheduler, 7, 39)
    assert str(caught.value) == (
        "the engine's queue holds 2 requests, the most it may (engine.max_queue_depth), which wait "
        "for 25000 bytes of KV memory; 3000 of 10000 are free; retry later"
    )


def test_engine_answers_who_waits_too_long_and_goes_on(tmp_path: Path) -> None:
    """The late sequence ends with a 503 of its own, those that run with their answer."""
    files = save_oracle(make_oracle("llama"), tmp_path)
    engine = load_engine(files, max_num_seqs=1, kv_wait_s=1e-6)
    engine.submit(OWNER, make_submit(random_prompt(5), sequence_id=1, ignore_eos=True))
    outcomes = {1: Result(), 2: Result()}
    collect(outcomes, engine.step())
    engine.submit(OWNER, make_submit(random_prompt(6), sequence_id=2, ignore_eos=True))
    run_to_end(engine, outcomes)
    assert len(outcomes[1].token_ids) == 8
    error = outcomes[2].error
    assert error is not None
    assert error.code == "queue_timeout"
    assert "1 of at most 1 requests run" in error.message
