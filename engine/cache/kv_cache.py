"""The paged KV cache and a hybrid's state slots: how large they are, and the tensors.

Sized once when the engine loads. Blocks are handed out by `BlockPool` and not cleared: attention
must read no slot beyond a sequence's length, where another one may have left a NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from cortexd import errors
from cortexd.models import ModelSpec
from cortexd.settings import Engine as EngineSettings
from engine.cache.context_limit import rounded
from engine.cache.state_cache import StateCache
from engine.kernels.cpu.arena import map_huge

MIB: Final = 1024 * 1024
# Of the memory that is free after the weights: on a CPU others live there too.
CPU_SHARE: Final = 0.25
# More than this is taken on a CPU only where one sequence of full length needs it.
CPU_SUFFICIENT_BYTES: Final = 2048 * MIB
# On CUDA the rest is for activations, logits, library workspaces and graph pools.
CUDA_SHARE: Final = 0.85


@dataclass(frozen=True, slots=True)
class CacheSize:
    """Blocks (the null block included) and the longest sequence that they and the model allow."""

    num_blocks: int
    context: int
    num_state_slots: int = 0  # of a hybrid model's recurrent state; the null slot not included


def choose_size(
    settings: EngineSettings, spec: ModelSpec, element_size: int, free_bytes: int, device_type: str
) -> CacheSize:
    """Return the cache size.

    A hybrid gets a state slot for each sequence that may run, and as many again for snapshots of
    cached prefixes, but of half the budget at most.
    Raises: InsufficientMemory when not even two blocks and one state fit.
    """
    block_bytes = spec.kv_bytes_per_token(element_size) * settings.block_size
    context = spec.max_position_embeddings
    if settings.max_model_len:
        context = min(context, settings.max_model_len)
    blocks_per_sequence = -(-context // settings.block_size)
    slot_bytes = spec.state_bytes_per_sequence(element_size)
    if settings.kv_cache_mib:
        budget = settings.kv_cache_mib * MIB
    elif device_type == "cuda":
        budget = int(free_bytes * CUDA_SHARE)
    else:
        one_sequence = (blocks_per_sequence + 1) * block_bytes + 2 * slot_bytes
        budget = min(int(free_bytes * CPU_SHARE), max(CPU_SUFFICIENT_BYTES, one_sequence))
    num_slots = 0
    least = 2 * block_bytes
    if slot_bytes:
        least += 2 * slot_bytes
        wanted = settings.max_num_seqs * (2 if settings.prefix_cache else 1)
        num_slots = max(1, min(wanted, budget // 2 // slot_bytes - 1))
    useful_blocks = settings.max_num_seqs * blocks_per_sequence + 1
    state_bytes = (num_slots + 1) * slot_bytes if slot_bytes else 0
    num_blocks = min((budget - state_bytes) // block_bytes, useful_blocks)
    if num_blocks < 2:
        states = " and two recurrent states" if slot_bytes else ""
        raise errors.InsufficientMemory(
            f"the KV cache needs at least {least} bytes (two blocks of {settings.block_size} "
            f"tokens{states}), {budget} are available; free memory or raise engine.kv_cache_mib",
            needed_bytes=least,
            available_bytes=budget,
        )
    held = (num_blocks - 1) * settings.block_size
    context = context if context <= held else rounded(held)
    return CacheSize(num_blocks, context, num_slots)


class KVCache:
    """K and V of all attention layers (see `layer`), and `states` of the linear ones.

    Layers are counted among their kind.
    """

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
        num_layers = len(spec.attention_layers)
        shape = (num_layers, size.num_blocks, block_size, num_heads, spec.head_dim)
        self.blocks = _unwritten(shape, dtype, device)
        self.size = size
        self.block_size = block_size
        self.states: StateCache | None = None
        if size.num_state_slots:
            self.states = StateCache(spec, size.num_state_slots, dtype, device)
        self._layers = list(self.blocks.unbind())
        self._slots = list(self.blocks.flatten(1, 2).unbind())

    @property
    def memory_bytes(self) -> int:
        """Bytes of the whole cache."""
        return self.blocks.nbytes + (0 if self.states is None else self.states.memory_bytes)

    def copy_states(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy a hybrid's states from slot to slot, in this order."""
        for source, target in copies:
            assert self.states is not None, "only a hybrid's plan moves states"
            self.states.copy(source, target)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.blocks.nbytes // self.size.num_blocks

    @property
    def slot_bytes(self) -> int:
        """Bytes of one sequence's recurrent state; 0 for a dense model."""
        return (
            0
            if self.states is None
            else self.states.memory_bytes // (self.size.num_state_slots + 1)
        )

    def layer(self, index: int) -> Tensor:
        """Return (num_blocks, block_size, 2 * num_kv_heads, head_dim): K heads first, then V."""
        return self._layers[index]

    def slots(self, index: int) -> Tensor:
        """Return the layer as (num_blocks * block_size, 2 * num_kv_heads, head_dim)."""
        return self._slots[index]


def _unwritten(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory that is not touched before use: a CPU maps it for blocks that were held once.

    On a CPU in huge pages: a position of a layer is 8 KB in a Qwen3-0.6B, so in small pages each
    costs two faults when it is written and two misses of the address cache when it is read.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return map_huge(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
