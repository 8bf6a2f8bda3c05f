"""Continuous batching: which tokens of which sequences the next step computes.

Called by the engine: `submit`, then `plan` / `complete` once per step, `finish` when a sequence
ends. Owns the running list and, through the block pool, all block tables; who waits is
`Admission`'s. Pure Python and deterministic: a tensor-parallel leader can send a plan to its
workers as it is.

A step holds one token of every decoding sequence, then prefill chunks within the token budget:
those of the prompt that needs the fewest first, so that a long one does not hold up all that come
after it. A prompt that a newer one overtakes moves up by one chunk, so it is overtaken at most as
often as it has chunks. When blocks run out, the newest running sequence that is not in the step
gives its blocks back, keeps its tokens, and waits at the head of the queue to be computed again.

Equal prefixes are computed once. A sequence takes over what the prefix cache holds when it is
admitted, and also while it prefills; and when a row of the plan is about to compute the very block
that it needs next, it sits this step out and takes the block in the next one. So of n answers to
one prompt, or of equal prompts sent together, one computes and the others follow a step behind.
A sequence that wants its prompt's log-probabilities takes over only what it has scored before: the
rest has to yield logits. These are large, so a step scores a bounded number of tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from cortexd.errors import QueueTimeout
from cortexd.settings import Engine as EngineSettings
from engine.cache.block_pool import NULL_BLOCK
from engine.cache.kv_room import KVRoom
from engine.cache.prefix_cache import PrefixCache
from engine.cache.prefix_tree import PrefixNode
from engine.cache.slot_pool import NULL_SLOT
from engine.cache.snapshots import Snapshots
from engine.scheduling.admission import Admission
from engine.scheduling.prefill_chunks import PrefillChunks, num_scored
from engine.scheduling.sequence import Sequence, SequenceState
from engine.scheduling.step_plan import PlanInMaking, PlannedRow, StepPlan

# Clean steps after which limits that were halved by an out-of-memory are doubled again.
STEPS_TO_REGROW: Final = 64


class Scheduler:
    """See the module's text. `context` is the most tokens one sequence may have."""

    def __init__(
        self,
        settings: EngineSettings,
        room: KVRoom,
        context: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the pools; `clock` says how long somebody waits, seconds."""
        pool, slots = room.pool, room.slots
        assert pool.num_usable * room.block_size >= context, "one full-length sequence must fit"
        self.room = room
        self.pool = pool
        self.slots = slots
        self.snapshots = None if slots is None else Snapshots(slots)
        self.prefix_cache = PrefixCache(
            pool, room.block_size, is_enabled=settings.prefix_cache, snapshots=self.snapshots
        )
        self.context = context
        self.token_budget = settings.max_num_batched_tokens
        # Every decoding sequence must fit into one step, so seats never outnumber the budget.
        self.max_running = min(settings.max_num_seqs, self.token_budget)
        if slots is not None:
            self.max_running = min(self.max_running, slots.num_slots)
        self.max_prefill_chunk = min(settings.max_prefill_chunk, self.token_budget)
        self.admission = Admission(settings, room, self.prefix_cache, self.max_running, clock)
        self.waiting = self.admission.waiting
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0
        self.chunks = PrefillChunks(
            self.prefix_cache, self.max_prefill_chunk, has_states=slots is not None
        )
        self._seat_limit = self.max_running
        self._clean_steps = 0

    def __repr__(self) -> str:
        return f"<Scheduler: {len(self.running)} running, {len(self.waiting)} waiting, {self.pool}>"

    @property
    def has_work(self) -> bool:
        """Whether any sequence runs or waits."""
        return bool(self.running or self.waiting)

    def check_queue(self) -> None:
        """Raise `Overloaded` when one more sequence would stand beyond the queue's bound."""
        self.admission.check(self.running)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence whose prompt fits the context. Raises: Overloaded."""
        assert len(sequence.token_ids) <= self.context, "the engine checks the prompt's length"
        self.check_queue()
        self.admission.add(sequence)

    def overdue(self) -> list[tuple[Sequence, QueueTimeout]]:
        """Return who has waited as long as it may, with the error; the caller finishes them."""
        return self.admission.overdue(self.running)

    def plan(self) -> StepPlan:
        """Choose the next step's rows and give them their blocks."""
        for sequence in self.running:
            self.prefix_cache.take(sequence, self.prefix_cache.find(sequence))
        while len(self.running) < self._seat_limit:
            found = self.admission.find(self.running)
            if found is None:
                break
            self._admit(self.waiting.popleft(), found)
        num_decodes = sum(sequence.num_uncomputed == 1 for sequence in self.running)
        budget = self.token_budget - num_decodes
        if num_decodes:
            # Decoding sequences wait for the whole step: bound what prefill adds to it.
            budget = min(budget, self.chunks.limit)
        making = PlanInMaking()
        self._plan_decodes(making)
        self._plan_prefills(making, budget)
        copies = [] if self.snapshots is None else self.snapshots.take_copies()
        return StepPlan(making.decodes + making.prefills, len(making.decodes), copies)

    def plan_ahead(self, plan: StepPlan) -> StepPlan | None:
        """Return the next token of the same rows, before the tokens of `plan` are known.

        None when another plan might be better or needed: a row does not decode its output, or ends
        with this token; somebody waits or sat the step out; or there are not enough free blocks.
        """
        if self.waiting or len(plan.rows) != len(self.running):
            return None
        missing = []
        for row in plan.rows:
            sequence = row.sequence
            # A prompt's last token may end a prefix that is yet to be published.
            if row.num_tokens != 1 or row.start < sequence.num_prompt_tokens:
                return None
            if sequence.num_output_tokens + 1 >= sequence.max_tokens:
                return None
            missing.append(self.room.num_blocks(row.start + 2) - len(sequence.block_table))
        if sum(missing) > self.pool.num_free:
            return None
        for row, count in zip(plan.rows, missing, strict=True):
            if count > 0:
                table = row.sequence.block_table
                table += self.pool.allocate(count, after=table[-1])
        rows = [replace(row, start=row.start + 1) for row in plan.rows]
        return StepPlan(rows, len(rows))

    def complete(self, plan: StepPlan) -> None:
        """Count the plan's tokens as computed; call it before sampled tokens are appended."""
        for row in plan.rows:
            row.sequence.num_computed = row.start + row.num_tokens
            row.sequence.num_scored += row.num_scored
            self.prefix_cache.publish(row.sequence)
        self._clean_steps += 1
        if self._clean_steps >= STEPS_TO_REGROW:
            self._clean_steps = 0
            self.chunks.regrow()
            self._seat_limit = min(self._seat_limit * 2, self.max_running)

    def finish(self, sequence: Sequence, *, is_tainted: bool = False) -> None:
        """Remove a sequence, wherever it stands, and release its blocks and its state slot.

        When it `is_tainted`, nothing that begins like it is kept for others.
        """
        if is_tainted:
            self.prefix_cache.discard(sequence)
        if sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
        elif sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
        else:
            return
        sequence.state = SequenceState.FINISHED
        self._release_blocks(sequence)
        self._release_slot(sequence)

    def reduce(self, plan: StepPlan) -> Sequence | None:
        """Make the next plans smaller, since this one ran out of memory and nothing of it counts.

        Chunks are halved down to a minimum, then the newer half of the sequences is preempted.
        Returns the sequence that cannot be helped when it was alone and at the minimum.
        """
        self._clean_steps = 0
        if self.slots is not None:
            # Some layers have advanced their state by this step's tokens, others have not.
            for row in plan.rows:
                self._release_blocks(row.sequence)
                row.sequence.num_computed = 0
                row.sequence.num_cached_tokens = 0
        if self.chunks.shrink(max(row.num_tokens for row in plan.rows)):
            return None
        if len(self.running) > 1:
            self._seat_limit = len(self.running) // 2
            while len(self.running) > self._seat_limit:
                self._preempt(self.running[-1])
        else:
            return plan.rows[0].sequence
        return None

    def _plan_decodes(self, making: PlanInMaking) -> None:
        for sequence in list(self.running):
            if sequence.state is not SequenceState.RUNNING or sequence.num_uncomputed != 1:
                continue  # preempted by an older one in this very loop, or prefills
            if self._take_blocks(making, sequence, 1):
                making.add_decode(PlannedRow(sequence, sequence.num_computed, 1, samples=True))
            else:
                self._preempt(sequence)

    def _plan_prefills(self, making: PlanInMaking, budget: int) -> None:
        prefilling = [sequence for sequence in self.running if sequence.num_uncomputed > 1]
        passed_over: list[Sequence] = []
        for sequence in sorted(prefilling, key=self.chunks.rank):  # stable: else oldest first
            if sequence.state is not SequenceState.RUNNING or self._waits_for(making, sequence):
                continue
            num_tokens = self.chunks.size(sequence, budget, making)
            if num_tokens == 0:
                # Nobody behind one whose chunk does not fit gets what is left.
                budget = 0
            num_tokens = self._take_blocks(making, sequence, num_tokens)
            if num_tokens == 0:
                passed_over.append(sequence)
                continue
            budget -= num_tokens
            samples = num_tokens == sequence.num_uncomputed
            scored = num_scored(sequence, num_tokens)
            row = PlannedRow(sequence, sequence.num_computed, num_tokens, samples, scored)
            making.add_prefill(row, self.prefix_cache.next_key(sequence))
        self._count_overtaken(making, passed_over)

    def _count_overtaken(self, making: PlanInMaking, passed_over: list[Sequence]) -> None:
        if not passed_over or not making.prefills:
            return
        age = {sequence: index for index, sequence in enumerate(self.running)}
        newest = max(age[row.sequence] for row in making.prefills)
        for sequence in passed_over:
            if age.get(sequence, newest) < newest:
                sequence.num_overtaken += 1

    def _waits_for(self, making: PlanInMaking, sequence: Sequence) -> bool:
        """Tell whether a row of this step computes what the sequence can take over in the next."""
        key = self.prefix_cache.next_key(sequence)
        return key in making.keys and self.prefix_cache.could_take_next(sequence)

    def _take_blocks(self, making: PlanInMaking, sequence: Sequence, num_tokens: int) -> int:
        """Give the sequence blocks for `num_tokens` more; return for how many there was room.

        Newer sequences that the step does not compute are preempted as far as needed.
        """
        held = len(sequence.block_table)
        missing = self.room.num_blocks(sequence.num_computed + num_tokens) - held
        while missing > self.pool.num_free:
            victim = self._newest_victim(making, sequence)
            if victim is None:
                break
            self._preempt(victim)
        missing = min(missing, self.pool.num_free)
        if missing > 0:
            last = sequence.block_table[-1] if held else NULL_BLOCK
            sequence.block_table += self.pool.allocate(missing, after=last)
        room = len(sequence.block_table) * self.room.block_size - sequence.num_computed
        return min(num_tokens, room)

    def _newest_victim(self, making: PlanInMaking, sequence: Sequence) -> Sequence | None:
        """Return the newest sequence that holds blocks and may lose them to `sequence`."""
        for candidate in reversed(self.running):
            if candidate is sequence:
                return None
            if candidate.block_table and candidate not in making.planned:
                return candidate
        return None

    def _admit(self, sequence: Sequence, found: list[PrefixNode]) -> None:
        self.prefix_cache.take(sequence, found)
        if self.snapshots is not None and sequence.state_slot == NULL_SLOT:
            sequence.state_slot = self.snapshots.allocate()
        sequence.state = SequenceState.RUNNING
        self.running.append(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release_blocks(sequence)
        self._release_slot(sequence)
        sequence.state = SequenceState.WAITING
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _release_blocks(self, sequence: Sequence) -> None:
        # Last block first: the head of a prompt is the part that others may share, keep it longest.
        self.pool.release(sequence.block_table[::-1])
        sequence.block_table = []
        sequence.prefix_node = None

    def _release_slot(self, sequence: Sequence) -> None:
        if self.slots is not None and sequence.state_slot != NULL_SLOT:
            self.slots.release(sequence.state_slot)
            sequence.state_slot = NULL_SLOT
