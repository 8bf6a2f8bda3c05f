"""A worker rank's engine: its share of the model, and the steps that the leader planned.

It has no scheduler and never samples: it runs what it is sent, so that the collectives complete.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cortexd.models import ModelFiles, ModelSpec
from cortexd.settings import Engine as EngineSettings
from engine import device as devices
from engine.batch import StepRow, build_batch
from engine.kv_cache import CacheSize, KVCache
from engine.model_load import LoadedModel, Progress, load_model
from engine.snapshots import StateCopy
from engine.tp.comm import Comm


class ShardRunner:
    """See the module's text."""

    def __init__(self, loaded: LoadedModel, comm: Comm, block_size: int) -> None:
        self.comm = comm
        self.loaded = loaded
        self.cache: KVCache | None = None
        self._block_size = block_size

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
        loaded = self.loaded
        size = CacheSize(num_blocks, num_blocks * self._block_size, num_state_slots)
        self.cache = KVCache(loaded.spec, size, self._block_size, loaded.dtype, loaded.device)

    @torch.inference_mode()
    def step(self, rows: Sequence[StepRow], state_copies: Sequence[StateCopy]) -> None:
        """Run one step of the leader's plan. Raises: RuntimeError when it, or a collective, fails.

        Rank 0 sees the logits; here they only complete its gather.
        """
        assert self.cache is not None, "the leader makes the cache before the first step"
        self.cache.copy_states(state_copies)
        batch = build_batch(rows, self._block_size, self.loaded.device)
        self.loaded.model.forward(batch, self.cache)
