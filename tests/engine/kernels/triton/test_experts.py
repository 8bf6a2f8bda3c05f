"""Experts that are chosen on the device against the same experts one by one in torch."""

from __future__ import annotations

import pytest
import torch

from engine.formats.ggml import GGMLType
from engine.kernels.triton.experts import PairTiles, group_pairs
from engine.kernels.triton.planes import PLANE_TYPES
from engine.layers.grouped_experts import GroupedExperts
from engine.layers.linear import Linear
from engine.layers.mlp import GatedMLP
from engine.layers.sparse_mlp import SeparateExperts
from engine.quant.tensor import QuantizedTensor
from tests.engine.kernels.quantized import random_rows
from tests.engine.kernels.triton.cases import DEVICE, TOLERANCE, random

HIDDEN, INTERMEDIATE = 256, 32


def choices(num_tokens: int, num_chosen: int, num_experts: int, seed: int = 0) -> torch.Tensor:
    """Return different expert ids for each token, (num_tokens, num_chosen)."""
    scores = random(num_tokens, num_experts, seed=seed)
    return scores.topk(num_chosen, dim=-1).indices


def pairs_by_expert(tiles: PairTiles) -> dict[int, list[int]]:
    """Return the pairs that the tiles bring together, in the tiles' order."""
    order = tiles.order.tolist()
    found: dict[int, list[int]] = {}
    columns = (tiles.experts.tolist(), tiles.firsts.tolist(), tiles.ends.tolist())
    for expert, first, end in zip(*columns, strict=False):
        assert end - first <= tiles.size
        if first < end:
            found.setdefault(expert, []).extend(order[first:end])
    return found


@pytest.mark.parametrize(
    ("num_tokens", "num_chosen", "num_experts"),
    [(1, 2, 16), (3, 2, 8), (70, 2, 4), (1, 1, 1), (40, 8, 60), (9, 4, 4)],
)
def test_tiles_hold_every_pair_once(num_tokens: int, num_chosen: int, num_experts: int) -> None:
    """Each at its expert, in the tokens' order."""
    chosen = choices(num_tokens, num_chosen, num_experts)
    expected: dict[int, list[int]] = {}
    for pair, expert in enumerate(chosen.flatten().tolist()):
        expected.setdefault(expert, []).append(pair)
    assert pairs_by_expert(group_pairs(chosen, num_experts)) == expected


@pytest.mark.parametrize("all_at", [0, 5])
def test_one_expert_may_get_all_tokens(all_at: int) -> None:
    """The tiles are as many as the worst routing needs."""
    chosen = torch.full((150, 1), all_at, device=DEVICE)
    assert pairs_by_expert(group_pairs(chosen, 6)) == {all_at: list(range(150))}


def dense(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Linear:
    weight = random(rows, columns, dtype=dtype, seed=seed) / columns**0.5
    return Linear(weight, dtype=dtype, backend="triton")


def quantised(name: str, rows: int, columns: int) -> Linear:
    drawn = random_rows(name, rows, columns)
    weight = QuantizedTensor(GGMLType[name], drawn.shape, drawn.packed.contiguous()).to(DEVICE)
    return Linear(weight, dtype=torch.float32, backend="triton")


def check(experts: list[GatedMLP], num_tokens: int, num_chosen: int, dtype: torch.dtype) -> None:
    """Compare both ways on random tokens."""
    hidden = random(num_tokens, HIDDEN, dtype=dtype)
    chosen = choices(num_tokens, num_chosen, len(experts))
    weights = random(num_tokens, num_chosen, seed=2).softmax(-1).to(dtype)
    grouped = GroupedExperts.of(experts)
    assert grouped is not None
    found = grouped(hidden, weights, chosen)
    expected = SeparateExperts(experts)(hidden, weights, chosen)
    assert found.dtype == dtype
    difference = (found.float() - expected.float()).abs().max()
    assert difference <= 2 * TOLERANCE[dtype] * expected.float().abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 70])
def test_dense_experts_equal_the_loop(num_tokens: int, dtype: torch.dtype) -> None:
    """Alone, few, grouped, and so many that tiles are full."""
    experts = [
        GatedMLP(
            dense(2 * INTERMEDIATE, HIDDEN, dtype, 2 * n),
            dense(HIDDEN, INTERMEDIATE, dtype, 2 * n + 1),
        )
        for n in range(6)
    ]
    check(experts, num_tokens, 2, dtype)


@pytest.mark.parametrize("num_tokens", [1, 9])
@pytest.mark.parametrize("name", sorted(kind.name for kind in PLANE_TYPES))
def test_quantised_experts_equal_the_loop(name: str, num_tokens: int) -> None:
    """Gate and up may be stored as different types."""
    experts = [
        GatedMLP(
            Linear.concatenated(
                [quantised(name, INTERMEDIATE, HIDDEN), quantised("Q8_0", INTERMEDIATE, HIDDEN)]
            ),
            quantised("Q8_0", HIDDEN, INTERMEDIATE),
        )
        for _ in range(5)
    ]
    check(experts, num_tokens, 2, torch.float32)


def test_experts_without_a_kernel_are_not_grouped() -> None:
    """Types that differ from expert to expert, or that no kernel reads, run one by one."""
    gate_up = quantised("Q8_0", 2 * INTERMEDIATE, HIDDEN)
    same = GatedMLP(gate_up, quantised("Q8_0", HIDDEN, INTERMEDIATE))
    other = GatedMLP(gate_up, quantised("Q4_0", HIDDEN, INTERMEDIATE))
    slabs = GatedMLP(gate_up, quantised("MXFP4", HIDDEN, INTERMEDIATE))
    assert GroupedExperts.of([same, same]) is not None
    assert GroupedExperts.of([same, other]) is None
    assert GroupedExperts.of([slabs, slabs]) is None
