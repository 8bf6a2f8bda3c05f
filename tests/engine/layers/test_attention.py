"""Paged attention against a softmax written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cortexd.settings import Engine as EngineSettings
from engine.batch import build_batch
from engine.cache.kv_cache import CacheSize, KVCache
from engine.layers.attention import paged_attention
from engine.scheduling.step_plan import PlannedRow, StepPlan
from tests.engine.cache.test_kv_cache import SPEC
from tests.engine.doubles import make_sequence

BLOCK_SIZE = EngineSettings().block_size
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 64


def reference(query: Tensor, key: Tensor, value: Tensor, first: int) -> Tensor:
    """Attend query rows at positions first.. to key and value (kv_len, num_kv_heads, head_dim)."""
    out = torch.empty_like(query)
    group = NUM_HEADS // NUM_KV_HEADS
    for row in range(query.shape[0]):
        for head in range(NUM_HEADS):
            visible = first + row + 1
            scores = key[:visible, head // group] @ query[row, head] * HEAD_DIM**-0.5
            out[row, head] = scores.softmax(0) @ value[:visible, head // group]
    return out.flatten(1)


@pytest.mark.parametrize("table", [[2, 3, 4], [5, 1, 3]])
def test_attention_reads_what_its_block_table_says(table: list[int]) -> None:
    """Whole prompts, chunks behind a prefix and single tokens, with blocks in any order."""
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(SPEC, CacheSize(6, 160), BLOCK_SIZE, torch.float32, torch.device("cpu"))
    cache.blocks.fill_(float("nan"))
    key_value = torch.randn(80, 2 * NUM_KV_HEADS, HEAD_DIM, generator=generator)
    slots = torch.tensor(
        [
            table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            for position in range(80)
        ]
    )
    cache.slots(2)[slots] = key_value
    sequence = make_sequence([1] * 80)
    sequence.block_table = table
    key, value = key_value[:, :NUM_KV_HEADS], key_value[:, NUM_KV_HEADS:]
    for start, count in ((0, 1), (0, 80), (33, 1), (33, 40), (79, 1)):
        plan = StepPlan([PlannedRow(sequence, start, count, samples=False)], 0)
        batch = build_batch(plan.rows, BLOCK_SIZE, torch.device("cpu"))
        query = torch.randn(count, NUM_HEADS, HEAD_DIM, generator=generator)
        got = paged_attention(query, cache, 2, batch, HEAD_DIM**-0.5)
        torch.testing.assert_close(got, reference(query, key, value, start), atol=1e-5, rtol=0)


def test_batch_holds_tokens_positions_and_slots_of_all_rows() -> None:
    """Rows follow one another; only sampling rows ask for logits."""
    first, second = make_sequence([5, 6, 7]), make_sequence([8] * 34)
    first.block_table, second.block_table = [3], [1, 4]
    plan = StepPlan(
        [
            PlannedRow(first, 2, 1, samples=True),
            PlannedRow(second, 30, 3, samples=False),
            PlannedRow(second, 33, 1, samples=True),
        ],
        num_decodes=1,
    )
    batch = build_batch(plan.rows, 32, torch.device("cpu"))
    assert batch.token_ids.tolist() == [7, 8, 8, 8, 8]
    assert batch.positions.tolist() == [2, 30, 31, 32, 33]
    assert batch.slots.tolist() == [98, 62, 63, 128, 129]
    assert batch.logit_rows.tolist() == [0, 4]
    assert [(row.start, row.end, row.kv_len) for row in batch.rows] == [
        (0, 1, 3),
        (1, 4, 33),
        (4, 5, 34),
    ]
