"""Which heads of the Gated DeltaNet layers a rank holds, and which rows of their tensors.

A rank holds whole K heads and the V heads that read them, so its recurrence needs no other rank.
With more ranks than K heads, several ranks hold the same K head and share its V heads out. Pure.

The fused tensors: `in_proj_qkv` and `conv1d` hold all q, then all k, then all v; `in_proj_qkvz` and
`in_proj_ba` hold for each K head its q, k, v, z, or its b and a. A GGUF of qwen35 has its V heads
tiled: V head i reads K head i modulo their number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from cortexd.models import LinearAttentionSpec

Ranges = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class LinearHeads:
    """One rank's K heads (contiguous) and V heads (ranges, in its own order)."""

    spec: LinearAttentionSpec  # of the whole model
    keys: slice
    values: Ranges

    @classmethod
    def of(cls, spec: LinearAttentionSpec, rank: int, world_size: int) -> LinearHeads:
        """Return the heads of `rank`; the world size has been checked."""
        num_keys, group = spec.num_key_heads, spec.num_value_heads // spec.num_key_heads
        if world_size <= num_keys:
            count = num_keys // world_size
            first, num_tiles = rank * count, group
            tile = 0
        else:
            count, first = 1, rank * num_keys // world_size
            num_tiles = spec.num_value_heads // world_size
            tile = rank % (world_size // num_keys) * num_tiles
        keys = slice(first, first + count)
        if spec.has_tiled_heads:
            starts = [(tile + index) * num_keys + first for index in range(num_tiles)]
            return cls(spec, keys, tuple(slice(start, start + count) for start in starts))
        start = first * group + tile
        return cls(spec, keys, (slice(start, start + count * num_tiles),))

    @property
    def local_spec(self) -> LinearAttentionSpec:
        """Return the sizes of this rank's layers."""
        return msgspec.structs.replace(
            self.spec,
            num_key_heads=self.keys.stop - self.keys.start,
            num_value_heads=sum(part.stop - part.start for part in self.values),
        )

    def per_value_head(self, size: int) -> Ranges:
        """Return this rank's part of a dimension that holds `size` for each V head."""
        return _scaled(self.values, size)

    @property
    def channels(self) -> Ranges:
        """This rank's part of all q, all k, all v, one behind the other."""
        spec = self.spec
        keys = _scaled([self.keys], spec.key_head_dim)
        values = self.per_value_head(spec.value_head_dim)
        return (
            *keys,
            *_shifted(keys, spec.key_size),
            *_shifted(values, 2 * spec.key_size),
        )

    def groups(self, key_sizes: Iterable[int], value_sizes: Iterable[int]) -> Ranges:
        """Return this rank's part of rows that are stored K head by K head.

        For each K head there are parts of `key_sizes` and then, for each of `value_sizes`, one part
        that holds so much for each of its V heads.
        """
        assert not self.spec.has_tiled_heads, "tiled heads are never stored K head by K head"
        per_key = self.spec.num_value_heads // self.spec.num_key_heads
        keys_size = sum(key_sizes)
        sizes = list(value_sizes)
        group_size = keys_size + per_key * sum(sizes)
        base = self.keys.start * group_size
        mine = self.values[0]
        if mine.stop - mine.start >= per_key:  # all V heads of these K heads
            return (slice(base, self.keys.stop * group_size),)
        own = slice(mine.start - self.keys.start * per_key, mine.stop - self.keys.start * per_key)
        ranges = [slice(base, base + keys_size)] if keys_size else []
        offset = base + keys_size
        for size in sizes:
            ranges += _shifted(_scaled([own], size), offset)
            offset += per_key * size
        return tuple(ranges)


def _scaled(ranges: Iterable[slice], size: int) -> Ranges:
    return tuple(slice(part.start * size, part.stop * size) for part in ranges)


def _shifted(ranges: Iterable[slice], offset: int) -> Ranges:
    return tuple(slice(part.start + offset, part.stop + offset) for part in ranges)
