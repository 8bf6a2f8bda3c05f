"""A step without torch: every KV slot remembers which tokens it was computed from.

A slot's value stands for the whole prefix up to its token, as real K and V do. So a wrong share, a
block written while others read it, or a block published too early shows as a wrong value.
"""

from __future__ import annotations

from engine.scheduler import PlannedRow, Scheduler, StepPlan
from engine.sequence import Sequence

OUTPUT_TOKEN = 7


class KVModel:
    """Runs a scheduler's plans against a memory of slots."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._slots: dict[int, tuple[str, tuple[int, ...]]] = {}

    def step(self) -> StepPlan:
        """Plan and complete a step in which each sampling row yields one token."""
        plan = self.scheduler.plan()
        self._check_plan(plan)
        for row in plan.rows:
            self._compute(row)
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
        plan = self.scheduler.plan()
        for row in plan.rows:
            for position in range(row.start, row.start + row.num_tokens):
                self._slots[self._slot(row.sequence, position)] = ("garbage", ())
        return self.scheduler.reduce(plan)

    def _compute(self, row: PlannedRow) -> None:
        sequence = row.sequence
        for position in range(row.start):
            found = self._slots[self._slot(sequence, position)]
            assert found == self._value(sequence, position), f"{sequence} reads others' KV"
        for position in range(row.start, row.start + row.num_tokens):
            self._slots[self._slot(sequence, position)] = self._value(sequence, position)

    def _slot(self, sequence: Sequence, position: int) -> int:
        size = self.scheduler.block_size
        return sequence.block_table[position // size] * size + position % size

    def _value(self, sequence: Sequence, position: int) -> tuple[str, tuple[int, ...]]:
        return sequence.submit.cache_salt, tuple(sequence.token_ids[: position + 1])

    def _check_plan(self, plan: StepPlan) -> None:
        scheduler = self.scheduler
        assert plan.rows, "work, but nothing planned"
        assert plan.num_tokens <= scheduler.token_budget
        assert len(scheduler.running) <= scheduler.max_running
        assert len({row.sequence for row in plan.rows}) == len(plan.rows)
        assert all(row.num_tokens == 1 for row in plan.rows[: plan.num_decodes])
        self._check_holders()

    def _check_holders(self) -> None:
        """Each held block is in a running sequence's table, and none of those is free."""
        held = {block for each in self.scheduler.running for block in each.block_table}
        assert len(held) == self.scheduler.pool.num_used
        assert all(self.scheduler.pool.is_held(block) for block in held)
        for sequence in self.scheduler.running:
            room = len(sequence.block_table) * self.scheduler.block_size
            assert sequence.num_computed <= room
