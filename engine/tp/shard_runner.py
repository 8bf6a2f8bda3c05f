"""A worker rank's engine: its share of the model, and the steps that the leader planned.

It has no scheduler and never samples: it runs what it is sent, so that the collectives complete.
"""

from __future__ import annotations

import torch

from cortexd.messages.rpc import GenerateStep
from cortexd.models import ModelFiles, ModelSpec
from cortexd.settings import Engine as EngineSettings
from engine import device as devices
from engine.batch import build_batch
from engine.cache.kv_cache import CacheSize, KVCache
from engine.loading.model_load import LoadedModel, Progress, load_model
from engine.tp.comm import Comm
from engine.tp.kept_states import KeptStates
from engine.tp.step_codec import StepDecoder


class ShardRunner:
    """See the module's text."""

    def __init__(self, loaded: LoadedModel, comm: Comm, block_size: int) -> None:
        self.comm = comm
        self.loaded = loaded
        self.cache: KVCache | None = None
        self.kept = KeptStates(lambda: self.cache)
        self._block_size = block_size
        self._steps: StepDecoder | None = None

    @classmethod
    def load(
        cls,
        files: ModelFiles,
        spec: ModelSpec,
        settings: EngineSettings,
        comm: Comm,
        *,
        device: torch.device,
        progress: Progress,
    ) -> ShardRunner:
        """Load this rank's part. Raises: what `load_model` raises."""
        loaded = load_model(files, spec, settings, comm, device=device, progress=progress)
        return cls(loaded, comm, settings.block_size)

    def __repr__(self) -> str:
        return f"<ShardRunner {self.loaded.spec.model_type}, {self.comm}>"

    @property
    def free_bytes(self) -> int:
        """Memory that this rank could still take."""
        return devices.free_memory_bytes(self.loaded.device, self.comm.world_size)

    @property
    def memory_bytes(self) -> int:
        """Bytes of weights and cache."""
        return self.loaded.weight_bytes + (self.cache.memory_bytes if self.cache else 0)

    @torch.inference_mode()
    def make_cache(self, num_blocks: int, num_state_slots: int) -> None:
        """Make the cache, or make it anew, of as many blocks and slots as the leader's has."""
        self.cache = None  # first, so that both never lie in memory together
        self.kept.clear()
        loaded = self.loaded
        size = CacheSize(num_blocks, num_blocks * self._block_size, num_state_slots)
        self.cache = KVCache(loaded.spec, size, self._block_size, loaded.dtype, loaded.device)
        self._steps = StepDecoder(size, self._block_size)

    @torch.inference_mode()
    def step(self, message: GenerateStep) -> None:
        """Run one step of the leader's plan.

        Rank 0 sees the logits; here they only complete its gather.
        Raises: InvalidValue before anything is run; RuntimeError when it, or a collective, fails.
        """
        assert self.cache is not None, "the leader makes the cache before the first step"
        assert self._steps is not None, "made with the cache"
        received = self._steps.decode(message)
        self.cache.copy_states(received.state_copies)
        batch = build_batch(received.rows, self._block_size, self.loaded.device)
        self.loaded.model.forward(batch, self.cache)
