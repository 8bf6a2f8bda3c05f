"""Keeps the device busy between decode steps: the next one starts before the last one is read.

Used by the engine when the model has `DecodeSteps`. State: the step that was started ahead, of
which nobody knows a token yet. A row that ends with the step before has then computed one token too
many: it went to blocks and a state slot that are handed out again only to steps behind it.
"""

from __future__ import annotations

from engine.decode_steps import DecodeSteps, Flight
from engine.sampling.row_results import RowResult
from engine.sampling.sampler import NOT_FINITE, SampledToken
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import SequenceState
from engine.scheduling.step_plan import StepPlan


class RunAhead:
    """See the module's text."""

    def __init__(self, steps: DecodeSteps, scheduler: Scheduler) -> None:
        self._steps = steps
        self._scheduler = scheduler
        self._started: Flight | None = None

    def __repr__(self) -> str:
        return f"<RunAhead: {'a step' if self._started else 'nothing'} started, {self._steps}>"

    def resume(self) -> StepPlan | None:
        """Return the plan of the step that was started, without rows that ended since."""
        if self._started is None:
            return None
        rows = [row for row in self._started.rows if row.sequence.state is SequenceState.RUNNING]
        if not rows:
            self._started = None
            return None
        return StepPlan(rows, len(rows))

    def reset(self) -> None:
        """Forget the step that was started, and all graphs; nothing runs any more."""
        self._started = None
        self._steps.forget_graphs()

    def takes(self, plan: StepPlan) -> bool:
        """Tell whether the plan can run here; one that was resumed always can."""
        return self._started is not None or self._steps.takes(plan.rows)

    def run(self, plan: StepPlan) -> list[RowResult]:
        """Run the plan, start the step behind it where its rows are known, return the results."""
        flight, self._started = self._started or self._steps.launch(plan.rows), None
        if len(flight.rows) == len(plan.rows):
            ahead = self._scheduler.plan_ahead(plan)
            if ahead is not None:
                self._started = self._steps.launch(ahead.rows, after=flight)
        drawn = dict(zip((row.sequence for row in flight.rows), flight.wait(), strict=True))
        return [RowResult(None, _token(drawn[row.sequence])) for row in plan.rows]


def _token(token_id: int) -> SampledToken:
    return NOT_FINITE if token_id < 0 else SampledToken(token_id)
