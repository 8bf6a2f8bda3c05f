"""The sequences of one engine from their submission to the last word that their owner hears.

Owned by the engine, called from its thread. Knows which are open, starts those whose grammar is
compiled, turns each row's result into what is told, and on an ending, whatever its reason, takes
the sequence from the scheduler, the sampler and the constraints.
"""

from __future__ import annotations

import logging

from cortexd import errors
from cortexd.log import event
from cortexd.messages.inference import SequenceDelta
from engine.sampling.row_results import RowResult, not_finite, nothing_allowed
from engine.sampling.sampler import SampledToken, Sampler
from engine.scheduling.constraints import Constraints
from engine.scheduling.load_figures import LoadFigures
from engine.scheduling.outbox import Outbox
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence
from engine.scheduling.step_plan import PlannedRow, StepPlan


class OpenSequences:
    """See the module's text."""

    def __init__(
        self,
        scheduler: Scheduler,
        sampler: Sampler,
        constraints: Constraints,
        figures: LoadFigures,
    ) -> None:
        self._scheduler = scheduler
        self._sampler = sampler
        self._constraints = constraints
        self._figures = figures
        self._open: dict[tuple[str, int], Sequence] = {}
        self._outbox = Outbox()

    def __len__(self) -> int:
        return len(self._open)

    def __repr__(self) -> str:
        return f"<OpenSequences: {len(self)}, {self._scheduler}>"

    @property
    def has_work(self) -> bool:
        """Whether anything is to be computed or to be told."""
        return self._scheduler.has_work or bool(self._outbox) or self._constraints.has_waiting

    def check_new(self, owner: str, sequence_id: int) -> None:
        """Raise InvalidValue when the owner has a sequence of this id already."""
        if (owner, sequence_id) in self._open:
            raise errors.InvalidValue(
                f"sequence {sequence_id} of {owner} is running already; use a new id"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, or wait for its grammar. Raises: InvalidValue, Overloaded."""
        if sequence.submit.grammar:
            self._scheduler.check_queue()
            self._constraints.add(sequence)
        else:
            self._scheduler.submit(sequence)
        self._open[sequence.owner, sequence.sequence_id] = sequence
        self._figures.num_prompt_tokens += sequence.num_prompt_tokens

    def begin_constrained(self) -> None:
        """Queue the sequences whose grammars are compiled; wait a moment if all work waits so."""
        if not self._constraints.has_waiting:
            return
        if not self._scheduler.has_work and not self._outbox:
            self._constraints.wait()
        for sequence in self._constraints.ready():
            try:
                self._scheduler.check_queue()
                self._constraints.begin(sequence)
            except errors.CortexError as error:
                self.fail(sequence, error)
                continue
            self._scheduler.submit(sequence)
            self._sampler.constrain(sequence, self._constraints.mask)

    def cancel(self, owner: str, sequence_id: int) -> None:
        """End a sequence with the word "cancelled"; an unknown id is ignored."""
        sequence = self._open.get((owner, sequence_id))
        if sequence is not None:
            self._finish(sequence)
            self._outbox.add_end(sequence, "cancelled")

    def cancel_owner(self, owner: str) -> None:
        """End all sequences of an owner that is gone, and tell it nothing any more."""
        for sequence in [s for s in self._open.values() if s.owner == owner]:
            self._finish(sequence)
        self._outbox.drop_owner(owner)

    def take(self) -> dict[str, list[SequenceDelta]]:
        """Return what there is to tell, by owner, and start anew."""
        return self._outbox.take()

    def close(self) -> None:
        """Drop all sequences."""
        for sequence in list(self._open.values()):
            self._finish(sequence)
        self._constraints.close()
        self._outbox.take()

    def deliver(self, row: PlannedRow, result: RowResult) -> None:
        """Tell what a row of a computed step has yielded."""
        sequence, token, scores = row.sequence, result.token, result.scores
        if scores is not None and len(scores.logprobs) < row.num_scored:
            # Those of this row are counted as scored already.
            index = sequence.num_scored - row.num_scored + len(scores.logprobs) + 1
            self.fail(sequence, not_finite(sequence, index), is_tainted=True)
            return
        if scores is not None or (token is None and sequence.num_output_tokens == 0):
            self._outbox.add_progress(sequence, scores)
        if token is None:
            return
        if token.token_id is None and not token.is_finite:
            error = not_finite(sequence, len(sequence.token_ids))
            self.fail(sequence, error, is_tainted=True)
        elif sequence.max_tokens == 0:
            self._finish(sequence)
            self._outbox.add_end(sequence, "length")
        elif token.token_id is None:
            self.fail(sequence, nothing_allowed(sequence))
        elif token.token_id in sequence.stop_token_ids:
            self._finish(sequence)
            self._outbox.add_end(sequence, "stop")
        else:
            self._add_token(sequence, token, token.token_id)

    def fail(
        self, sequence: Sequence, error: errors.CortexError, *, is_tainted: bool = False
    ) -> None:
        """End a sequence with an error; when it `is_tainted`, nothing of it is kept for others."""
        self._finish(sequence, is_tainted=is_tainted)
        self._outbox.add_end(sequence, "error", error)

    def fail_step(self, plan: StepPlan, error: Exception) -> None:
        """End all sequences of a step that raised; nothing that it computed is kept."""
        sequences = [row.sequence for row in plan.rows]
        request_ids = sorted({sequence.submit.request_id for sequence in sequences})
        event(
            logging.getLogger("cortexd.engine"),
            "engine.step_failed",
            logging.ERROR,
            exc_info=True,
            error=repr(error),
            requests=request_ids,
        )
        for sequence in sequences:
            name = sequence.submit.request_id
            fault = errors.Internal(f"request {name}: a step of the engine failed; see its log")
            self.fail(sequence, fault)

    def _add_token(self, sequence: Sequence, token: SampledToken, token_id: int) -> None:
        sequence.token_ids.append(token_id)
        self._figures.num_generated_tokens += 1
        reason = "length" if sequence.num_output_tokens >= sequence.max_tokens else None
        try:
            if self._constraints.advance(sequence):
                reason = "stop"
        except errors.InvalidValue as error:
            self.fail(sequence, error)
            return
        if reason is not None:
            self._finish(sequence)
        self._outbox.add_token(sequence, token, reason)

    def _finish(self, sequence: Sequence, *, is_tainted: bool = False) -> None:
        if not self._constraints.release(sequence):
            self._scheduler.finish(sequence, is_tainted=is_tainted)
        self._sampler.release(sequence)
        del self._open[sequence.owner, sequence.sequence_id]
