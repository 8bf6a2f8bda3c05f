"""The operations between the matrix products, against torch and against themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels import cpu
from engine.kernels.cpu import ops, reference
from engine.kernels.cpu.ops import AttentionRow, Rotary

BLOCK_SIZE = 8


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("size", [16, 576, 1040])
def test_rms_norm_matches_torch_and_is_row_invariant(size: int, isa: str) -> None:
    x, weight = random(70, size) * 3, random(size, seed=1)
    got = ops.rms_norm(x, weight, 1e-5)
    assert close(got, reference.rms_norm(x, weight, 1e-5))
    assert torch.equal(torch.cat([ops.rms_norm(row, weight, 1e-5) for row in x.split(1)]), got)


def test_silu_mul_matches_torch_and_is_row_invariant(isa: str) -> None:
    x = random(40, 2 * 48) * 10
    x[0, :6] = torch.tensor([0.0, -0.0, 90.0, -90.0, 200.0, -200.0])
    got = ops.silu_mul(x)
    assert close(got, reference.silu_mul(x))
    assert torch.equal(torch.cat([ops.silu_mul(row) for row in x.split(1)]), got)


def test_silu_mul_keeps_nan(isa: str) -> None:
    x = random(1, 64)
    x[0, 3] = torch.nan
    assert ops.silu_mul(x).isnan().nonzero().tolist() == [[0, 3]]


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (64, 24), (80, 80), (128, 128)])
def test_rope_and_kv_write_matches_torch(
    head_dim: int, rotary_dim: int, has_norm: bool, isa: str
) -> None:
    num_tokens, num_heads, num_kv_heads = 7, 6, 2
    rotary = Rotary(10000.0 ** -(torch.arange(rotary_dim // 2) * 2 / rotary_dim), 1.25)
    norm = random(num_heads + num_kv_heads, head_dim, seed=2) if has_norm else None
    positions = torch.tensor([0, 1, 2, 3000, 5, 77, 8191])
    slots = torch.tensor([3, 17, 4, 9, 31, 0, 22])
    results = []
    for function in (ops.rope_and_kv_write, reference.rope_and_kv_write):
        qkv = random(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
        cache = torch.zeros(4, BLOCK_SIZE, 2 * num_kv_heads, head_dim)
        function(qkv, positions, slots, cache, rotary, head_norm=norm, eps=1e-6)
        results.append((qkv, cache))
    (qkv, cache), (expected_qkv, expected_cache) = results
    assert torch.allclose(qkv, expected_qkv, rtol=1e-5, atol=1e-5)
    assert torch.allclose(cache, expected_cache, rtol=1e-5, atol=1e-5)


def paged_case(
    lengths: list[tuple[int, int]], num_heads: int, num_kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, list[AttentionRow]]:
    """Return query, cache and rows of (new tokens, kv_len) sequences in shuffled blocks.

    Slots that belong to nobody hold NaN.
    """
    blocks_of = [-(-kv_len // BLOCK_SIZE) for _, kv_len in lengths]
    order = torch.randperm(sum(blocks_of), generator=torch.Generator().manual_seed(5))
    cache = torch.full((sum(blocks_of), BLOCK_SIZE, 2 * num_kv_heads, head_dim), torch.nan)
    rows = []
    start = 0
    for (num_tokens, kv_len), ids in zip(lengths, order.split(blocks_of), strict=True):
        filled = random(len(ids) * BLOCK_SIZE, 2 * num_kv_heads, head_dim, seed=kv_len)
        filled[kv_len:] = torch.nan
        cache[ids] = filled.view(len(ids), BLOCK_SIZE, -1, head_dim)
        rows.append(AttentionRow(start, start + num_tokens, kv_len, block_ids=ids))
        start += num_tokens
    return random(start, num_heads, head_dim, seed=9) * 2, cache, rows


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    [(9, 3, 64), (4, 4, 32), (14, 2, 64), (5, 1, 80), (4, 2, 96), (4, 2, 128), (2, 1, 256)],
)
def test_paged_attention_matches_torch(
    num_heads: int, num_kv_heads: int, head_dim: int, isa: str
) -> None:
    lengths = [(1, 1), (1, 300), (1, 17), (5, 5), (20, 290), (3, 600)]
    query, cache, rows = paged_case(lengths, num_heads, num_kv_heads, head_dim)
    got = ops.paged_attention(query, cache, rows, head_dim**-0.5)
    expected = reference.paged_attention(query, cache, rows, head_dim**-0.5)
    assert torch.allclose(got, expected, rtol=1e-4, atol=2e-6)


def test_paged_attention_token_is_the_same_in_any_step(isa: str) -> None:
    # All in one step; each sequence alone; token by token, as decoding computes it.
    lengths = [(1, 700), (45, 530), (9, 9)]
    query, cache, rows = paged_case(lengths, 6, 2, 64)
    whole = ops.paged_attention(query, cache, rows, 0.125)
    for row in rows:
        num_tokens = row.end - row.start
        mine = query[row.start : row.end]
        alone = AttentionRow(0, num_tokens, row.kv_len, block_ids=row.block_ids)
        assert torch.equal(
            ops.paged_attention(mine, cache, [alone], 0.125), whole[row.start : row.end]
        )
        for i in range(num_tokens):
            seen = row.kv_len - (num_tokens - 1 - i)
            single = AttentionRow(0, 1, seen, block_ids=row.block_ids)
            got = ops.paged_attention(mine[i : i + 1], cache, [single], 0.125)
            assert torch.equal(got[0], whole[row.start + i])


@pytest.mark.parametrize("num_threads", [1, 3])
def test_paged_attention_does_not_depend_on_threads(num_threads: int) -> None:
    query, cache, rows = paged_case([(1, 900), (40, 300)], 4, 2, 64)
    two = ops.paged_attention(query, cache, rows, 0.125)
    cpu.set_num_threads(num_threads)
    assert torch.equal(ops.paged_attention(query, cache, rows, 0.125), two)


def test_paged_attention_reads_consecutive_slots_without_a_table() -> None:
    cache = random(4, BLOCK_SIZE, 2, 64)
    query = random(2, 3, 64, seed=4)
    by_table = AttentionRow(0, 2, 15, block_ids=torch.tensor([1, 2]))
    in_place = AttentionRow(0, 2, 15, first_slot=BLOCK_SIZE)
    assert torch.equal(
        ops.paged_attention(query, cache, [in_place], 0.125),
        ops.paged_attention(query, cache, [by_table], 0.125),
    )


def test_paged_attention_takes_queries_inside_qkv_rows() -> None:
    qkv = random(3, 5, 32)
    cache = random(2, BLOCK_SIZE, 2, 32)
    row = AttentionRow(0, 3, 9, first_slot=0)
    expected = ops.paged_attention(qkv[:, :3].contiguous(), cache, [row], 0.2)
    assert torch.equal(ops.paged_attention(qkv[:, :3], cache, [row], 0.2), expected)
