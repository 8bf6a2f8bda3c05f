"""Triton attention over the paged cache against the torch reference."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.triton.attention_decode import attend_decode, choose_splits
from engine.kernels.triton.attention_prefill import attend_prefill
from engine.layers.attention import paged_attention
from tests.engine.kernels.triton.cases import DEVICE, AttentionCase, Lengths, attention_case, close

DTYPES = [torch.float32, torch.bfloat16]
# num_heads, num_kv_heads, head_dim, block_size
SHAPES = [(4, 4, 64, 8), (6, 2, 64, 16), (8, 1, 128, 32), (4, 2, 256, 16), (3, 1, 80, 8)]


def expected(case: AttentionCase) -> torch.Tensor:
    """Return what the reference makes of a case."""
    scale = case.query.shape[-1] ** -0.5
    return paged_attention(case.query, case.cache, 0, case.batch, scale)


def make(lengths: Lengths, shape: tuple[int, int, int, int], dtype: torch.dtype) -> AttentionCase:
    num_heads, num_kv_heads, head_dim, block_size = shape
    return attention_case(
        lengths,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_splits", [1, 3])
def test_decode_equals_the_reference(
    shape: tuple[int, int, int, int], num_splits: int, dtype: torch.dtype
) -> None:
    """Short rows leave splits without tokens, long ones end inside a tile."""
    case = make([(1, 1), (1, 150), (1, 64), (1, 33)], shape, dtype)
    found = attend_decode(
        case.query,
        case.cache.layer(0),
        case.paged.block_tables,
        case.paged.kv_lens,
        scale=shape[2] ** -0.5,
        num_splits=num_splits,
    )
    close(found, expected(case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_equals_the_reference(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Whole prompts, chunks behind a prefix, and rows of one token, in one batch."""
    case = make([(70, 70), (5, 90), (1, 40), (65, 66)], shape, dtype)
    found = attend_prefill(
        case.query,
        case.cache.layer(0),
        case.paged.block_tables,
        case.paged.kv_lens,
        case.paged.query_starts,
        max(case.paged.query_lens),
        scale=shape[2] ** -0.5,
    )
    close(found, expected(case))


def test_splits_fill_the_device_and_are_not_cut_too_thin() -> None:
    """Many rows need no split; one long row gets many; a short one is not cut at all."""
    assert choose_splits(64, 8, 4096, DEVICE) == 1
    assert choose_splits(1, 1, 4096, DEVICE) > 4
    assert choose_splits(1, 1, 60, DEVICE) == 1
