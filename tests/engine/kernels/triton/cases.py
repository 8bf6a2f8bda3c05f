"""Batches of rows for kernel tests: sequences of random K and V in scattered cache blocks."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from cortexd.models import ModelSpec
from engine.batch import PagedRows, StepBatch, build_batch
from engine.cache.kv_cache import CacheSize, KVCache
from engine.kernels.triton import is_interpreted
from engine.scheduling.step_plan import PlannedRow
from tests.engine.doubles import TINY, make_sequence

DEVICE = torch.device("cpu" if is_interpreted() else "cuda")
# Of values around 1: accumulation order in float32, one rounding in the others.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
Lengths = list[tuple[int, int]]  # per row: query tokens, and tokens it sees in all


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return standard normal numbers on the device, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def close(found: Tensor, expected: Tensor) -> None:
    """Check that two tensors agree as their dtype allows."""
    assert found.dtype == expected.dtype, f"{found.dtype} instead of {expected.dtype}"
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=tolerance)


@dataclass
class AttentionCase:
    """Rows of one batch, their queries, and a cache that is NaN wherever nothing was written."""

    batch: StepBatch
    paged: PagedRows
    query: Tensor
    cache: KVCache


def make_batch(lengths: Lengths, block_size: int) -> tuple[StepBatch, int]:
    """Return rows whose blocks are dealt in turn from both ends, and the number of blocks."""
    counts = [-(-kv_len // block_size) for _, kv_len in lengths]
    free = list(range(1, sum(counts) + 1))
    rows = []
    for (query_len, kv_len), count in zip(lengths, counts, strict=True):
        sequence = make_sequence([1] * kv_len)
        sequence.block_table = [free.pop(-(index % 2)) for index in range(count)]
        sequence.state_slot = len(rows) + 1
        rows.append(PlannedRow(sequence, kv_len - query_len, query_len, samples=True))
    return build_batch(rows, block_size, DEVICE), sum(counts) + 1


def attention_case(
    lengths: Lengths,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
) -> AttentionCase:
    """Return random queries, and a cache with random K and V where the rows may look."""
    spec: ModelSpec = msgspec.structs.replace(
        TINY,
        num_hidden_layers=1,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
    )
    batch, num_blocks = make_batch(lengths, block_size)
    cache = KVCache(spec, CacheSize(num_blocks, 4096), block_size, dtype, DEVICE)
    cache.blocks.fill_(float("nan"))
    for index, row in enumerate(batch.rows):
        positions = torch.arange(row.kv_len)
        slots = torch.tensor(row.blocks)[positions // block_size] * block_size
        slots = (slots + positions % block_size).to(DEVICE)
        written = random(row.kv_len, 2 * num_kv_heads, head_dim, dtype=dtype, seed=index + 1)
        cache.slots(0)[slots] = written
    query = random(batch.rows[-1].end, num_heads, head_dim, dtype=dtype)
    return AttentionCase(batch, PagedRows.of(batch.rows), query, cache)
