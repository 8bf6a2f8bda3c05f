"""How much memory a model needs on each device before it is loaded, and what would need less. Pure.

Called by the router to make room. The weights come from the tensor plan with the chosen quant; the
KV cache counts with what one sequence of a useful length takes, since it is sized by what is free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from cortexd.models import ModelSpec, WeightBytes
from cortexd.settings import Engine

MIB: Final = 2**20
# A model that is loaded for less context than this serves hardly anyone.
USEFUL_CONTEXT: Final = 4096
# Activations of a step, logits, and the process itself, shared pages aside. On a CPU, measured with
# SmolLM2-135M (Q4_1) as private memory beyond weights and touched KV: 14 MiB when loaded, 37 in a
# prompt of 4000 tokens, 73 with 8 streams, 143 with a prompt's log-probabilities; the rest is for
# larger vocabularies. For CUDA (context, library workspaces, allocator's slack) an estimate.
SCRATCH_BYTES: Final[Mapping[str, int]] = {"cpu": 256 * MIB, "cuda": 1536 * MIB}


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes of one rank: weights, the least KV cache (states included), everything else."""

    weights: int
    cache: int
    scratch: int
    context: int  # tokens that `cache` is for

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.scratch


def memory_need(
    spec: ModelSpec, weights: WeightBytes, settings: Engine, *, kind: str, world_size: int = 1
) -> MemoryNeed:
    """Return what one rank of `world_size` needs on a device of `kind` ("cpu" or "cuda")."""
    element_size = _element_size(settings, kind)
    context = min(spec.max_position_embeddings, USEFUL_CONTEXT)
    if settings.max_model_len:
        context = min(context, settings.max_model_len)
    cache = _cache_bytes(_local(spec, world_size), context, element_size or 4, settings)
    if settings.kv_cache_mib and kind == "cuda":
        # Taken at once there; on a CPU pages are mapped when they are used.
        cache = settings.kv_cache_mib * MIB
    if element_size is None:
        loaded = weights.as_stored
    else:
        loaded = weights.in_16_bit if element_size == 2 else weights.in_32_bit
    return MemoryNeed(-(-loaded // world_size), cache, SCRATCH_BYTES[kind], context)


def missing_bytes(needs: Mapping[int, int], free: Mapping[int, int]) -> dict[int, int]:
    """Return by device what is lacking there; a device whose free memory is unknown has enough."""
    lacking = {index: need - free[index] for index, need in needs.items() if index in free}
    return {index: lack for index, lack in lacking.items() if lack > 0}


def what_fits(
    spec: ModelSpec,
    weights: WeightBytes,
    settings: Engine,
    *,
    kind: str,
    world_size: int,
    free_bytes: int,
) -> list[str]:
    """Return the changes, each alone, with which a rank would fit into `free_bytes`."""
    need = memory_need(spec, weights, settings, kind=kind, world_size=world_size)
    room = free_bytes - need.cache - need.scratch
    found = [
        f'quant = "{name}"'
        for name, size in sorted(weights.if_quantised.items(), key=lambda item: -item[1])
        if -(-size // world_size) <= room and -(-size // world_size) < need.weights
    ]
    rest = free_bytes - need.weights - need.scratch
    context = _context_within(_local(spec, world_size), rest, settings, kind)
    if 0 < context < need.context and not settings.kv_cache_mib:
        found.append(f"engine.max_model_len = {context}")
    elif settings.kv_cache_mib and context > 0:
        found.append("a smaller engine.kv_cache_mib")
    return found


def describe(needs: Mapping[int, Sequence[MemoryNeed]], free: Mapping[int, int]) -> str:
    """Return "device 0 needs 2.5 GiB (weights …) and 1.0 GiB are free" for each device."""
    parts = []
    for index, ranks in needs.items():
        total = sum(need.total for need in ranks)
        weights, cache, scratch = (
            sum(getattr(need, part) for need in ranks) for part in ("weights", "cache", "scratch")
        )
        parts.append(
            f"device {index} needs {_gib(total)} (weights {_gib(weights)}, KV cache of "
            f"{ranks[0].context} tokens {_gib(cache)}, working memory {_gib(scratch)}) and "
            f"{_gib(free[index])} are free"
        )
    return "; ".join(parts)


def _element_size(settings: Engine, kind: str) -> int | None:
    """Return the bytes of a dense weight, None: as it is stored."""
    if settings.dtype != "auto" and (kind == "cuda" or settings.backend == "reference"):
        return 4 if settings.dtype == "float32" else 2
    return 2 if kind == "cuda" else None


def _local(spec: ModelSpec, world_size: int) -> ModelSpec:
    heads = max(spec.num_key_value_heads // world_size, 1)
    return msgspec.structs.replace(spec, num_key_value_heads=heads)


def _cache_bytes(spec: ModelSpec, context: int, element_size: int, settings: Engine) -> int:
    """Return the bytes of one sequence's KV with the null block, and of a hybrid's two states."""
    tokens = (-(-context // settings.block_size) + 1) * settings.block_size
    states = 2 * spec.state_bytes_per_sequence(element_size)
    return tokens * spec.kv_bytes_per_token(element_size) + states


def _context_within(spec: ModelSpec, room: int, settings: Engine, kind: str) -> int:
    """Return how many tokens, in whole blocks, a cache of `room` bytes holds."""
    element_size = _element_size(settings, kind) or 4
    room -= 2 * spec.state_bytes_per_sequence(element_size)
    block_bytes = spec.kv_bytes_per_token(element_size) * settings.block_size
    return max(room // block_bytes - 1, 0) * settings.block_size if block_bytes else 0


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
