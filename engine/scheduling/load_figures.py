"""What an engine tells of its load: speeds, KV memory in bytes, and the context it offers.

Fed by the engine after every step and asked by the poller once a second.
"""

from __future__ import annotations

from cortexd.messages.fleet import LoadReport
from cortexd.models import ModelLimits
from cortexd.settings import Engine as EngineSettings
from engine.cache.context_limit import offered_context
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_plan import StepPlan
from engine.scheduling.throughput import MovingRate


class LoadFigures:
    """Counters and moving averages of one engine, and the report made of them."""

    def __init__(self, settings: EngineSettings, limits: ModelLimits, scheduler: Scheduler) -> None:
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self._settings = settings
        self._limits = limits
        self._scheduler = scheduler
        self._steps = 0
        self._prefill_rate = MovingRate()
        self._decode_rate = MovingRate()
        self._chunk_rate = MovingRate()  # of steps that do nothing but prefill, and much of it

    @property
    def offered(self) -> ModelLimits:
        """The limits at the present speed, at most those of the cache."""
        rate = self._chunk_rate.tokens_per_s
        context = offered_context(self._limits.context, rate, self._settings)
        return ModelLimits(context=context, output=context - 1)

    def count_step(self, plan: StepPlan, elapsed_s: float) -> None:
        """Count one step that was computed."""
        self._steps += 1
        num_prefilled = plan.num_tokens - plan.num_decodes
        self._decode_rate.add(plan.num_decodes, elapsed_s)
        self._prefill_rate.add(num_prefilled, elapsed_s)
        if plan.num_decodes == 0 and num_prefilled >= self._scheduler.max_prefill_chunk // 2:
            # Small steps are slow per token, which says nothing of a long prompt.
            self._chunk_rate.add(num_prefilled, elapsed_s)

    def report(self, model_id: str) -> LoadReport:
        """Return the figures. A state slot counts as used while its sequence runs."""
        scheduler, pool, room = self._scheduler, self._scheduler.pool, self._scheduler.room
        num_running, num_waiting = len(scheduler.running), len(scheduler.waiting)
        return LoadReport(
            model_id=model_id,
            num_running=num_running,
            num_waiting=num_waiting,
            kv_blocks_used=pool.num_used,
            kv_blocks_total=pool.num_usable,
            tok_s_prefill=self._prefill_rate.tokens_per_s,
            tok_s_decode=self._decode_rate.tokens_per_s,
            num_preemptions=scheduler.num_preemptions,
            num_prompt_tokens=self.num_prompt_tokens,
            num_generated_tokens=self.num_generated_tokens,
            steps=self._steps,
            num_cached_tokens=scheduler.prefix_cache.num_hit_tokens,
            kv_blocks_cached=pool.num_cached,
            kv_bytes_total=room.limit_bytes,
            kv_bytes_used=room.sum_bytes(pool.num_used, num_running),
            kv_bytes_waiting=scheduler.admission.waiting_bytes,
            context=self.offered.context,
        )
