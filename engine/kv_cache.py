"""The paged KV cache: how large it is, and the tensor that holds it.

Sized once when the engine loads. Blocks are handed out by `BlockPool` and not cleared: attention
must read no slot beyond a sequence's length, where another one may have left a NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from cortexd import errors
from cortexd.models import ModelSpec
from cortexd.settings import Engine as EngineSettings

MIB: Final = 1024 * 1024
# Of the memory that is free after the weights: on a CPU others live there too.
CPU_SHARE: Final = 0.25
# On CUDA the rest is for activations, logits, library workspaces and graph pools.
CUDA_SHARE: Final = 0.85


@dataclass(frozen=True, slots=True)
class CacheSize:
    """Blocks (the null block included) and the longest sequence that they and the model allow."""

    num_blocks: int
    context: int


def choose_size(
    settings: EngineSettings, spec: ModelSpec, element_size: int, free_bytes: int, device_type: str
) -> CacheSize:
    """Return the cache size. Raises: InsufficientMemory when not even two blocks fit."""
    block_bytes = spec.kv_bytes_per_token(element_size) * settings.block_size
    context = spec.max_position_embeddings
    if settings.max_model_len:
        context = min(context, settings.max_model_len)
    if settings.kv_cache_mib:
        budget = settings.kv_cache_mib * MIB
    else:
        budget = int(free_bytes * (CUDA_SHARE if device_type == "cuda" else CPU_SHARE))
    blocks_per_sequence = -(-context // settings.block_size)
    useful_blocks = settings.max_num_seqs * blocks_per_sequence + 1
    num_blocks = min(budget // block_bytes, useful_blocks)
    if num_blocks < 2:
        raise errors.InsufficientMemory(
            f"the KV cache needs at least {2 * block_bytes} bytes (two blocks of "
            f"{settings.block_size} tokens), {budget} are available; free memory or raise "
            "engine.kv_cache_mib",
            needed_bytes=2 * block_bytes,
            available_bytes=budget,
        )
    return CacheSize(num_blocks, min(context, (num_blocks - 1) * settings.block_size))


class KVCache:
    """K and V of all attention layers; see `layer`."""

    def __init__(
        self,
        spec: ModelSpec,
        size: CacheSize,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        num_heads = 2 * spec.num_key_value_heads
        # K heads, then V heads of a token side by side: one copy writes both.
        shape = (spec.num_hidden_layers, size.num_blocks, block_size, num_heads, spec.head_dim)
        # Not touched before use, so a CPU maps memory only for blocks that were held once.
        self.blocks = torch.empty(shape, dtype=dtype, device=device)
        self.block_size = block_size
        self._layers = list(self.blocks.unbind())
        self._slots = list(self.blocks.flatten(1, 2).unbind())

    @property
    def memory_bytes(self) -> int:
        """Bytes of the whole cache."""
        return self.blocks.nbytes

    def layer(self, index: int) -> Tensor:
        """Return (num_blocks, block_size, 2 * num_kv_heads, head_dim): K heads first, then V."""
        return self._layers[index]

    def slots(self, index: int) -> Tensor:
        """Return the layer as (num_blocks * block_size, 2 * num_kv_heads, head_dim)."""
        return self._slots[index]
