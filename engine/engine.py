"""One loaded model: sequences go in, tokens come out, one step at a time.

Called by the leader actor from one thread. Owns the weights, the KV cache, the scheduler and the
sampler. A row with non-finite logits fails alone; a step that runs out of memory is repeated with
fewer tokens; any other error fails the requests of its step. What cannot be survived (see
`engine.step_faults`) is raised, and the caller ends the process: a lost device, an error that
recurs, and with several ranks any error while they are inside a step.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable

import msgspec
import torch

from cortexd import errors
from cortexd.log import event
from cortexd.messages.fleet import LoadReport
from cortexd.messages.inference import SequenceDelta, Submit
from cortexd.models import ModelFiles, ModelLimits, ModelSpec
from cortexd.settings import Engine as EngineSettings
from engine import device as devices
from engine.batch import build_batch
from engine.block_pool import BlockPool
from engine.constraints import Constraints, compiler_for
from engine.decode_steps import CapturableModel, DecodeSteps
from engine.grammar.compiler import GrammarCompiler
from engine.kv_cache import KVCache, choose_size
from engine.kv_room import KVRoom
from engine.largest_step import activation_bytes
from engine.load_figures import LoadFigures
from engine.model_load import Model, load_model
from engine.outbox import Outbox
from engine.row_results import RowResult, not_finite, nothing_allowed, read_results
from engine.run_ahead import RunAhead
from engine.sampler import SampledToken, Sampler
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.sleep import Asleep, check_can_sleep, may_sleep, tensors_of
from engine.slot_pool import SlotPool
from engine.snapshots import StateCopy
from engine.step_faults import StepFaults
from engine.step_plan import PlannedRow, StepPlan
from engine.submission import make_sequence
from engine.tp.comm import Comm
from engine.tp.lockstep import Alone, Lockstep


class Engine:
    """See the module's text."""

    def __init__(
        self,
        model: Model,
        spec: ModelSpec,
        settings: EngineSettings,
        *,
        device: torch.device,
        dtype: torch.dtype,
        weight_bytes: int = 0,
        lockstep: Lockstep | None = None,
        world_size: int = 1,
        grammars: GrammarCompiler | None = None,
        capturable: CapturableModel | None = None,
    ) -> None:
        """Size the cache from what memory is left; `model` is on `device` already.

        `spec` has the sizes of this rank's layers; without `grammars` none can be followed;
        `capturable` is the model's form for decode steps that do not wait for the host.
        """
        self._lockstep = lockstep or Alone()
        self._is_split = world_size > 1
        free = devices.free_memory_bytes(device, world_size)
        if not self._is_split:  # ranks would have to run the step together
            free -= activation_bytes(model, spec, settings, dtype, device)
        free = self._lockstep.shards_loaded(free)
        size = choose_size(settings, spec, dtype.itemsize, free, device.type)
        self.model = model
        self.spec = spec
        self.cache = KVCache(spec, size, settings.block_size, dtype, device)
        room = KVRoom(
            BlockPool(size.num_blocks),
            settings.block_size,
            self.cache.block_bytes,
            SlotPool(size.num_state_slots) if size.num_state_slots else None,
            self.cache.slot_bytes,
        )
        self.scheduler = Scheduler(settings, room, size.context)
        self._ahead: RunAhead | None = None
        if capturable is not None:
            max_blocks = -(-size.context // settings.block_size)
            steps = DecodeSteps(capturable, self.cache, max_blocks, device)
            self._ahead = RunAhead(steps, self.scheduler)
        self.sampler = Sampler()
        self._constraints = Constraints(grammars, device, settings.max_queue_depth)
        self.limits = ModelLimits(context=size.context, output=size.context - 1)
        self.memory_bytes = weight_bytes + self.cache.memory_bytes
        self.memory_bytes += self._lockstep.make_cache(size)
        self.device_name = devices.device_name(device)
        self.dtype_name = str(dtype).removeprefix("torch.")
        self.backend_name = model.backend_name
        self._device = device
        self._weight_bytes = weight_bytes
        self._asleep: Asleep | None = None
        self._sequences: dict[tuple[str, int], Sequence] = {}
        self._outbox = Outbox()
        self._faults = StepFaults(device)
        # Of a split model's step that failed before the workers heard of it: the next one's to do.
        self._owed_copies: list[StateCopy] = []
        self.figures = LoadFigures(settings, self.limits, self.scheduler)

    @classmethod
    @torch.inference_mode()
    def load(
        cls,
        files: ModelFiles,
        spec: ModelSpec,
        settings: EngineSettings,
        progress: Callable[[float, str], None],
        *,
        comm: Comm | None = None,
        device: torch.device | None = None,
        lockstep: Lockstep | None = None,
    ) -> Engine:
        """Load a model's weights and size its cache; `progress` gets (fraction, stage).

        Of a model split over several ranks this is rank 0: `comm` links it to the others, and
        `lockstep` tells them what to do.

        Raises: BadModelFile, UnsupportedArchitecture, InsufficientMemory, ConfigError.
        """
        # The first use on a machine may compile the CPU kernels, which takes some seconds.
        progress(0.0, "preparing")
        comm = comm or Comm()
        device = device or devices.choose_device(settings)
        loaded = load_model(files, spec, settings, comm, device=device, progress=progress)
        engine = cls(
            loaded.model,
            loaded.spec,
            settings,
            device=device,
            dtype=loaded.dtype,
            weight_bytes=loaded.weight_bytes,
            lockstep=lockstep,
            world_size=comm.world_size,
            grammars=compiler_for(files, spec),
            capturable=loaded.capturable,
        )
        progress(1.0, "ready")
        return engine

    def __repr__(self) -> str:
        return f"<Engine {self.spec.model_type} on {self.device_name}: {self.scheduler}>"

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to compute or to deliver."""
        return self.scheduler.has_work or bool(self._outbox) or self._constraints.has_waiting

    def submit(self, owner: str, submit: Submit) -> None:
        """Queue one sequence; a model that sleeps wakes first.

        Raises: InvalidValue, ContextLengthExceeded, Overloaded; InsufficientMemory from waking.
        """
        key = (owner, submit.sequence_id)
        if key in self._sequences:
            raise errors.InvalidValue(
                f"sequence {submit.sequence_id} of {owner} is running already; use a new id"
            )
        sequence = make_sequence(owner, submit, self.spec, self.limits)
        self.wake()
        if submit.grammar:
            self.scheduler.check_queue()
            self._constraints.add(sequence)
        else:
            self.scheduler.submit(sequence)
        self._sequences[key] = sequence
        self.figures.num_prompt_tokens += sequence.num_prompt_tokens

    def cancel(self, owner: str, sequence_id: int) -> None:
        """Free the sequence now; the next step says "cancelled". An unknown id is ignored."""
        sequence = self._sequences.get((owner, sequence_id))
        if sequence is not None:
            self._finish(sequence)
            self._outbox.add_end(sequence, "cancelled")

    def cancel_owner(self, owner: str) -> None:
        """Free all sequences of an owner that is gone; nothing is delivered to it any more."""
        for sequence in [s for s in self._sequences.values() if s.owner == owner]:
            self._finish(sequence)
        self._outbox.drop_owner(owner)

    @torch.inference_mode()
    def step(self) -> dict[str, list[SequenceDelta]]:
        """Run one step; return what it and cancellations before it have to tell, by owner.

        Raises: what cannot be survived; the engine is then unusable.
        """
        self._begin_constrained()
        if self.scheduler.has_work:
            started = time.perf_counter()
            plan = self._plan()
            assert plan.rows, f"{self.scheduler} has work and planned none of it"
            results = self._execute(plan)
            if results is not None:
                self._faults.clear()
                self.scheduler.complete(plan)
                for row, result in zip(plan.rows, results, strict=True):
                    self._deliver(row, result)
                self.figures.count_step(plan, time.perf_counter() - started)
        return self._outbox.take()

    @property
    def sleep_bytes(self) -> int:
        """Host memory that the weights take while the model sleeps; 0: it cannot sleep."""
        return self._weight_bytes if may_sleep(self._device, self._is_split) else 0

    @property
    def is_asleep(self) -> bool:
        """Whether the weights are in host memory."""
        return self._asleep is not None

    @torch.inference_mode()
    def sleep(self) -> None:
        """Move the weights to host memory and free the device; a submission wakes the model.

        Raises: InvalidRequest on a CPU or several ranks, ServiceUnavailable while requests run,
        InsufficientMemory when the host has no room.
        """
        if self._asleep is not None:
            return
        check_can_sleep(self._device, self._weight_bytes, is_split=self._is_split)
        if self.has_work or self._sequences:
            raise errors.ServiceUnavailable(
                f"the model answers {len(self._sequences)} sequences; let them end before it sleeps"
            )
        if self._ahead is not None:
            self._ahead.reset()
        self.scheduler.pool.evict_all()
        self._asleep = Asleep(kept=tensors_of(self.model), dropped=tensors_of(self.cache))
        devices.release_cached_memory(self._device)

    @torch.inference_mode()
    def wake(self) -> None:
        """Move the weights back. Raises: InsufficientMemory when the device has no room now."""
        if self._asleep is None:
            return
        try:
            self._asleep.wake()
        except RuntimeError as error:
            if not devices.is_out_of_memory(error):
                raise
            free = devices.free_memory_bytes(self._device)
            raise errors.InsufficientMemory(
                f"the model needs {self.memory_bytes} bytes to wake on {self.device_name}, {free} "
                "are available; unload or put another model to sleep",
                needed_bytes=self.memory_bytes,
                available_bytes=free,
            ) from error
        self._asleep = None

    def report(self, model_id: str) -> LoadReport:
        """Return the load figures."""
        return msgspec.structs.replace(self.figures.report(model_id), is_asleep=self.is_asleep)

    def close(self) -> None:
        """Drop all sequences; the process's end frees the memory."""
        for sequence in list(self._sequences.values()):
            self._finish(sequence)
        self._constraints.close()
        self._outbox.take()

    def _begin_constrained(self) -> None:
        """Queue the sequences whose grammars are compiled; wait a moment if all work waits so."""
        if not self._constraints.has_waiting:
            return
        if not self.scheduler.has_work and not self._outbox:
            self._constraints.wait()
        for sequence in self._constraints.ready():
            try:
                self.scheduler.check_queue()
                self._constraints.begin(sequence)
            except errors.CortexError as error:
                self._fail(sequence, error)
                continue
            self.scheduler.submit(sequence)
            self.sampler.constrain(sequence, self._constraints.mask)

    def _plan(self) -> StepPlan:
        """Return the next step, which may run already; end who could not begin in time."""
        plan = self._ahead.resume() if self._ahead is not None else None
        if plan is None:
            plan = self.scheduler.plan()
            # After the plan: who can begin now is not late.
            for sequence, error in self.scheduler.overdue():
                self._fail(sequence, error)
        return plan

    def _execute(self, plan: StepPlan) -> list[RowResult] | None:
        """Return each row's result; None when the step failed, which has been dealt with.

        Raises: what cannot be survived.
        """
        if self._owed_copies:
            copies = [*self._owed_copies, *plan.state_copies]
            plan = dataclasses.replace(plan, state_copies=copies)
        self._owed_copies = plan.state_copies
        if not self._is_split:
            # Before anything can go wrong: what the states are needed for lies ahead.
            self._copy_states(plan)
        is_in_lockstep = True
        try:
            if self._ahead is not None and self._ahead.takes(plan):
                return self._ahead.run(plan)
            batch = build_batch(plan.rows, self.cache.block_size, self._device)
            is_in_lockstep = not self._is_split
            self._lockstep.begin_step(plan)
            if self._is_split:
                self._copy_states(plan)  # with the workers, who have them from the plan
            logits = self.model.forward(batch, self.cache)
            self._lockstep.end_step()
            is_in_lockstep = True
            return read_results(plan.rows, logits, self.sampler)
        except Exception as error:
            verdict = self._faults.judge(error, is_in_lockstep=is_in_lockstep)
            if verdict == "end":
                raise
            if verdict == "fail":
                self._fail_step(plan, error)
        # Only here, past the handler, are the failed step's tensors free.
        devices.release_cached_memory(self._device)
        if verdict == "shrink":
            self._shrink(plan)
        return None

    def _copy_states(self, plan: StepPlan) -> None:
        self.cache.copy_states(plan.state_copies)
        self._owed_copies = []

    def _fail_step(self, plan: StepPlan, error: Exception) -> None:
        """End all requests of a step that raised; nothing that it computed is kept."""
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
            self._fail(sequence, fault)

    def _shrink(self, plan: StepPlan) -> None:
        sequence = self.scheduler.reduce(plan)
        if sequence is not None:
            error = errors.InsufficientMemory(
                f"request {sequence.submit.request_id} does not fit into the device's memory, "
                "even alone and with the smallest step; shorten the prompt"
            )
            self._fail(sequence, error)

    def _deliver(self, row: PlannedRow, result: RowResult) -> None:
        sequence, token, scores = row.sequence, result.token, result.scores
        if scores is not None and len(scores.logprobs) < row.num_scored:
            # Those of this row are counted as scored already.
            index = sequence.num_scored - row.num_scored + len(scores.logprobs) + 1
            self._fail(sequence, not_finite(sequence, index), is_tainted=True)
            return
        if scores is not None or (token is None and sequence.num_output_tokens == 0):
            self._outbox.add_progress(sequence, scores)
        if token is None:
            return
        if token.token_id is None and not token.is_finite:
            error = not_finite(sequence, len(sequence.token_ids))
            self._fail(sequence, error, is_tainted=True)
        elif sequence.max_tokens == 0:
            self._finish(sequence)
            self._outbox.add_end(sequence, "length")
        elif token.token_id is None:
            self._fail(sequence, nothing_allowed(sequence))
        elif token.token_id in sequence.stop_token_ids:
            self._finish(sequence)
            self._outbox.add_end(sequence, "stop")
        else:
            self._add_token(sequence, token, token.token_id)

    def _add_token(self, sequence: Sequence, token: SampledToken, token_id: int) -> None:
        sequence.token_ids.append(token_id)
        self.figures.num_generated_tokens += 1
        reason = "length" if sequence.num_output_tokens >= sequence.max_tokens else None
        try:
            if self._constraints.advance(sequence):
                reason = "stop"
        except errors.InvalidValue as error:
            self._fail(sequence, error)
            return
        if reason is not None:
            self._finish(sequence)
        self._outbox.add_token(sequence, token, reason)

    def _fail(
        self, sequence: Sequence, error: errors.CortexError, *, is_tainted: bool = False
    ) -> None:
        self._finish(sequence, is_tainted=is_tainted)
        self._outbox.add_end(sequence, "error", error)

    def _finish(self, sequence: Sequence, *, is_tainted: bool = False) -> None:
        if not self._constraints.release(sequence):
            self.scheduler.finish(sequence, is_tainted=is_tainted)
        self.sampler.release(sequence)
        del self._sequences[sequence.owner, sequence.sequence_id]
