"""A step without torch: every KV slot and every state remembers which tokens made it.

A slot's value stands for the whole prefix up to its token, as real K and V do, and so does a
hybrid's recurrent state. So a wrong share, a block written while others read it, or a block or
state published too early shows as a wrong value. It also counts which prompt tokens were scored.
"""

from __future__ import annotations

from engine.scheduling import prefill_chunks
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence
from engine.scheduling.step_plan import PlannedRow, StepPlan

OUTPUT_TOKEN = 7
Value = tuple[str, tuple[int, ...]]  # salt and tokens
GARBAGE: Value = ("garbage", ())


class KVModel:
    """Runs a scheduler's plans against a memory of slots."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._slots: dict[int, Value] = {}
        self._states: dict[int, Value] = {}
        self.scored: dict[Sequence, list[int]] = {}  # positions, in the order of the steps

    def step(self) -> StepPlan:
        """Plan and complete a step in which each sampling row yields one token."""
        plan = self.scheduler.plan()
        self._check_plan(plan)
        self._copy_states(plan)
        for row in plan.rows:
            self._compute(row)
            self._score(row)
        self.scheduler.complete(plan)
        self._check_holders()
        for row in plan.rows:
            if row.samples:
                row.sequence.token_ids.append(OUTPUT_TOKEN)
                if row.sequence.num_output_tokens >= row.sequence.max_tokens:
                    self.scheduler.finish(row.sequence)
        return plan

    def step_without_memory(self) -> Sequence | None:
        """Plan a step that runs out of memory halfway; return what must be given up."""
        return self.scheduler.reduce(self._plan_and_spoil())

    def step_with_an_error(self) -> list[Sequence]:
        """Plan a step that raises halfway; return its sequences, which have been ended."""
        sequences = [row.sequence for row in self._plan_and_spoil().rows]
        for sequence in sequences:
            self.scheduler.finish(sequence)
        return sequences

    def _plan_and_spoil(self) -> StepPlan:
        plan = self.scheduler.plan()
        self._check_plan(plan)
        self._copy_states(plan)
        for row in plan.rows:
            self._states[row.sequence.state_slot] = GARBAGE
            for position in range(row.start, row.start + row.num_tokens):
                self._slots[self._slot(row.sequence, position)] = GARBAGE
        return plan

    def _copy_states(self, plan: StepPlan) -> None:
        for source, target in plan.state_copies:
            self._states[target] = self._states[source]

    def _compute(self, row: PlannedRow) -> None:
        sequence = row.sequence
        if row.start and self.scheduler.slots is not None:
            state = self._states[sequence.state_slot]
            assert state == self._value(sequence, row.start - 1), f"{sequence} has another's state"
        end = row.start + row.num_tokens
        self._states[sequence.state_slot] = self._value(sequence, end - 1)
        for position in range(row.start):
            found = self._slots[self._slot(sequence, position)]
            assert found == self._value(sequence, position), f"{sequence} reads others' KV"
        for position in range(row.start, row.start + row.num_tokens):
            self._slots[self._slot(sequence, position)] = self._value(sequence, position)

    def _score(self, row: PlannedRow) -> None:
        """Note whose successors a row's logits score: the last tokens but one that samples."""
        end = row.start + row.num_tokens - row.samples
        assert row.num_logits <= row.num_tokens
        scored = self.scored.setdefault(row.sequence, [])
        scored += range(end - row.num_scored, end)
        assert scored == list(range(len(scored))), f"{row.sequence} is scored out of order"
        if row.samples and row.sequence.submit.num_prompt_logprobs >= 0:
            assert len(scored) == row.sequence.num_prompt_tokens - 1, "a token before all scores"

    def _slot(self, sequence: Sequence, position: int) -> int:
        size = self.scheduler.room.block_size
        return sequence.block_table[position // size] * size + position % size

    def _value(self, sequence: Sequence, position: int) -> Value:
        return sequence.submit.cache_salt, tuple(sequence.token_ids[: position + 1])

    def _check_plan(self, plan: StepPlan) -> None:
        scheduler = self.scheduler
        assert plan.rows, "work, but nothing planned"
        assert plan.num_tokens <= scheduler.token_budget
        num_scored = sum(row.num_scored for row in plan.rows)
        assert num_scored <= prefill_chunks.MAX_SCORED_TOKENS
        assert len(scheduler.running) <= scheduler.max_running
        assert len({row.sequence for row in plan.rows}) == len(plan.rows)
        assert all(row.num_tokens == 1 for row in plan.rows[: plan.num_decodes])
        self._check_holders()

    def _check_holders(self) -> None:
        """Each held block is in a running sequence's table, and none of those is free."""
        held = {block for each in self.scheduler.running for block in each.block_table}
        assert len(held) == self.scheduler.pool.num_used
        assert all(self.scheduler.pool.is_held(block) for block in held)
        slots, snapshots = self.scheduler.slots, self.scheduler.snapshots
        if slots is not None and snapshots is not None:
            own = {sequence.state_slot for sequence in self.scheduler.running}
            assert len(own) == len(self.scheduler.running) == slots.num_used - len(snapshots)
        for sequence in self.scheduler.running:
            room = len(sequence.block_table) * self.scheduler.room.block_size
            assert sequence.num_computed <= room
