"""One loaded model: sequences go in, tokens come out, one step at a time.

Called by the leader actor from one thread. Owns the weights, the KV cache, the scheduler and the
sampler. A row with non-finite logits fails alone; a step that runs out of memory is repeated with
fewer tokens; any other error fails the requests of its step. What cannot be survived (see
`engine.step_faults`) is raised, and the caller ends the process: a lost device, an error that
recurs, and with several ranks any error while they are inside a step.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import msgspec
import torch

from cortexd import errors
from cortexd.messages.fleet import LoadReport
from cortexd.messages.inference import SequenceDelta, Submit
from cortexd.models import ModelFiles, ModelLimits, ModelSpec
from cortexd.settings import Engine as EngineSettings
from engine import device as devices
from engine.batch import build_batch
from engine.cache.block_pool import BlockPool
from engine.cache.kv_cache import KVCache, choose_size
from engine.cache.kv_room import KVRoom
from engine.cache.slot_pool import SlotPool
from engine.cache.snapshots import StateCopy
from engine.decode_steps import CapturableModel, DecodeSteps
from engine.grammar.compiler import GrammarCompiler
from engine.largest_step import activation_bytes
from engine.loading.model_load import Model, load_model
from engine.run_ahead import RunAhead
from engine.sampling.row_results import RowResult, read_results
from engine.sampling.sampler import Sampler
from engine.scheduling.constraints import Constraints, compiler_for
from engine.scheduling.load_figures import LoadFigures
from engine.scheduling.open_sequences import OpenSequences
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_plan import StepPlan
from engine.scheduling.submission import make_sequence
from engine.sleep import Asleep, check_can_sleep, may_sleep, tensors_of
from engine.step_faults import StepFaults
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
        self.limits = ModelLimits(context=size.context, output=size.context - 1)
        self.memory_bytes = weight_bytes + self.cache.memory_bytes
        self.memory_bytes += self._lockstep.make_cache(size)
        self.device_name = devices.device_name(device)
        self.dtype_name = str(dtype).removeprefix("torch.")
        self.backend_name = model.backend_name
        self._device = device
        self._weight_bytes = weight_bytes
        self._asleep: Asleep | None = None
        self._faults = StepFaults(device)
        # Of a split model's step that failed before the workers heard of it: the next one's to do.
        self._owed_copies: list[StateCopy] = []
        self.figures = LoadFigures(settings, self.limits, self.scheduler)
        constraints = Constraints(grammars, device, settings.max_queue_depth)
        self._sequences = OpenSequences(self.scheduler, self.sampler, constraints, self.figures)

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
        return self._sequences.has_work

    def submit(self, owner: str, submit: Submit) -> None:
        """Queue one sequence; a model that sleeps wakes first.

        Raises: InvalidValue, ContextLengthExceeded, Overloaded; InsufficientMemory from waking.
        """
        self._sequences.check_new(owner, submit.sequence_id)
        sequence = make_sequence(owner, submit, self.spec, self.limits)
        self.wake()
        self._sequences.add(sequence)

    def cancel(self, owner: str, sequence_id: int) -> None:
        """Free the sequence now; the next step says "cancelled". An unknown id is ignored."""
        self._sequences.cancel(owner, sequence_id)

    def cancel_owner(self, owner: str) -> None:
        """Free all sequences of an owner that is gone; nothing is delivered to it any more."""
        self._sequences.cancel_owner(owner)

    @torch.inference_mode()
    def step(self) -> dict[str, list[SequenceDelta]]:
        """Run one step; return what it and cancellations before it have to tell, by owner.

        Raises: what cannot be survived; the engine is then unusable.
        """
        self._sequences.begin_constrained()
        if self.scheduler.has_work:
            started = time.perf_counter()
            plan = self._plan()
            assert plan.rows, f"{self.scheduler} has work and planned none of it"
            results = self._execute(plan)
            if results is not None:
                self._faults.clear()
                self.scheduler.complete(plan)
                for row, result in zip(plan.rows, results, strict=True):
                    self._sequences.deliver(row, result)
                self.figures.count_step(plan, time.perf_counter() - started)
        return self._sequences.take()

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
        self._sequences.close()

    def _plan(self) -> StepPlan:
        """Return the next step, which may run already; end who could not begin in time."""
        plan = self._ahead.resume() if self._ahead is not None else None
        if plan is None:
            plan = self.scheduler.plan()
            # After the plan: who can begin now is not late.
            for sequence, error in self.scheduler.overdue():
                self._sequences.fail(sequence, error)
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
                self._sequences.fail_step(plan, error)
        # Only here, past the handler, are the failed step's tensors free.
        devices.release_cached_memory(self._device)
        if verdict == "shrink":
            self._shrink(plan)
        return None

    def _copy_states(self, plan: StepPlan) -> None:
        self.cache.copy_states(plan.state_copies)
        self._owed_copies = []

    def _shrink(self, plan: StepPlan) -> None:
        sequence = self.scheduler.reduce(plan)
        if sequence is not None:
            error = errors.InsufficientMemory(
                f"request {sequence.submit.request_id} does not fit into the device's memory, "
                "even alone and with the smallest step; shorten the prompt"
            )
            self._sequences.fail(sequence, error)
