"""The scheduler of a hybrid: each running sequence holds one state slot, and no slot is lost."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cortexd.settings import Engine as EngineSettings
from engine.cache.block_pool import BlockPool
from engine.cache.kv_room import KVRoom
from engine.cache.slot_pool import NULL_SLOT, SlotPool
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence, SequenceState
from tests.engine.doubles import make_sequence
from tests.engine.scheduling.test_scheduler import run_step

CONTEXT = 64


def make_scheduler(num_slots: int, num_blocks: int = 16) -> Scheduler:
    """Return a scheduler with fewer slots than seats."""
    fields = EngineSettings(max_num_batched_tokens=32, max_prefill_chunk=16, max_num_seqs=8)
    room = KVRoom(BlockPool(num_blocks + 1), 8, 1000, SlotPool(num_slots), 300)
    return Scheduler(fields, room, CONTEXT)


def check_slots(scheduler: Scheduler, sequences: list[Sequence]) -> None:
    """Exactly the running sequences hold a slot, each its own."""
    held = [s.state_slot for s in sequences if s.state_slot != NULL_SLOT]
    assert len(set(held)) == len(held)
    assert scheduler.slots is not None
    assert scheduler.slots.num_used == len(held)
    for sequence in sequences:
        assert (sequence.state_slot != NULL_SLOT) == (sequence.state is SequenceState.RUNNING)


def test_sequences_wait_for_a_slot() -> None:
    """With two slots the third sequence waits, although blocks and seats are free."""
    scheduler = make_scheduler(2)
    sequences = [make_sequence([1] * 4, sequence_id=index, max_tokens=3) for index in range(3)]
    for sequence in sequences:
        scheduler.submit(sequence)
    run_step(scheduler)
    assert [s.state.value for s in sequences] == ["running", "running", "waiting"]
    while scheduler.has_work:
        run_step(scheduler)
        check_slots(scheduler, sequences)
    assert [s.num_output_tokens for s in sequences] == [3, 3, 3]


def test_preempted_sequence_gives_its_slot_back_and_starts_anew() -> None:
    """The state is gone with the slot, so the sequence is computed from its first token."""
    scheduler = make_scheduler(2, num_blocks=8)
    old, new = (make_sequence([1] * 24, sequence_id=i, max_tokens=30) for i in range(2))
    scheduler.submit(old)
    scheduler.submit(new)
    while not new.num_preemptions:
        run_step(scheduler)
    assert (new.state_slot, new.num_computed) == (NULL_SLOT, 0)
    while scheduler.has_work:
        check_slots(scheduler, [old, new])
        run_step(scheduler)
    assert new.num_output_tokens == 30


@settings(max_examples=60)
@given(data=st.data())
def test_random_traffic_never_loses_or_shares_a_slot(data: st.DataObject) -> None:
    """Arrivals, cancels, preemptions and steps that ran out of memory; in the end all is free."""
    scheduler = make_scheduler(data.draw(st.integers(1, 4)), num_blocks=10)
    sequences: list[Sequence] = []
    for _ in range(data.draw(st.integers(5, 40))):
        action = data.draw(st.sampled_from(["submit", "step", "step", "cancel", "reduce"]))
        if action == "submit":
            length = data.draw(st.integers(1, 40))
            sequences.append(make_sequence([1] * length, sequence_id=len(sequences), max_tokens=9))
            scheduler.submit(sequences[-1])
        elif action == "cancel" and sequences:
            scheduler.finish(data.draw(st.sampled_from(sequences)))
        elif action == "reduce" and scheduler.has_work:
            hopeless = scheduler.reduce(scheduler.plan())
            if hopeless is not None:
                scheduler.finish(hopeless)
        elif scheduler.has_work:
            run_step(scheduler)
        check_slots(scheduler, sequences)
    for _ in range(2000):
        if not scheduler.has_work:
            break
        run_step(scheduler)
    check_slots(scheduler, sequences)
    assert all(sequence.state is SequenceState.FINISHED for sequence in sequences)
    assert scheduler.pool.num_used == 0
