"""How much memory the largest step takes beside weights and cache, found before the cache is made.

Used by the engine on CUDA, where the cache takes nearly all that is left. On a CPU memory is not
handed out in advance, so nothing is measured there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cortexd.models import ModelSpec
from cortexd.settings import Engine as EngineSettings
from engine.batch import build_batch
from engine.cache.kv_cache import CacheSize, KVCache
from engine.loading.model_load import Model


@dataclass(frozen=True, slots=True)
class _Row:
    """A prompt's first chunk."""

    num_tokens: int
    block_table: list[int]
    state_slot: int
    start: int = 0
    num_logits: int = 1

    @property
    def token_ids(self) -> list[int]:
        return [0] * self.num_tokens


@torch.inference_mode()
def activation_bytes(
    model: Model,
    spec: ModelSpec,
    settings: EngineSettings,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Return the most that a step allocates; 0 on a CPU. The model is on the device already."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    cache_bytes = run_largest_step(model, spec, settings, dtype, device)
    peak = torch.cuda.max_memory_allocated(device) - before - cache_bytes
    torch.cuda.empty_cache()
    # Logits of a full batch in float32, and sorted with their places (int64) for the sampler.
    return peak + settings.max_num_seqs * spec.vocab_size * (4 + 4 + 8)


def run_largest_step(
    model: Model,
    spec: ModelSpec,
    settings: EngineSettings,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Run a step of `max_num_batched_tokens` on a cache of its own; return the cache's bytes."""
    block_size, budget = settings.block_size, settings.max_num_batched_tokens
    longest = min(settings.max_prefill_chunk, spec.max_position_embeddings)
    lengths = [longest] * (budget // longest) + [budget % longest] * (budget % longest > 0)
    rows: list[_Row] = []
    num_blocks = 1
    for index, length in enumerate(lengths):
        count = -(-length // block_size)
        rows.append(_Row(length, list(range(num_blocks, num_blocks + count)), index + 1))
        num_blocks += count
    num_slots = len(rows) if spec.linear_layers else 0
    cache = KVCache(spec, CacheSize(num_blocks, longest, num_slots), block_size, dtype, device)
    model.forward(build_batch(rows, block_size, device), cache)
    return cache.memory_bytes
