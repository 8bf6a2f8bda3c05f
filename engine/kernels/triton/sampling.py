"""The draw of one token per row: the rules and the random numbers of `engine.sampling.sampler`.

One program per row walks twice over its candidates, sorted the most likely first, or over the whole
vocabulary in its order when nothing is cut off: once for the mass that may be drawn from, once for
where the random number falls. Masses are float64, as in the reference.

Source: Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE: Final = 1024


@triton.jit
def _uniform(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """Return a float64 in [0, 1) with 53 random bits, equal to `engine.sampling.philox.uniform`."""
    low = tl.full([], 0xFFFFFFFF, tl.uint64)
    k0 = seed.to(tl.uint64, bitcast=True) & low
    k1 = seed.to(tl.uint64, bitcast=True) >> 32
    c0 = position.to(tl.uint64, bitcast=True) & low
    c1 = position.to(tl.uint64, bitcast=True) >> 32
    c2 = tl.full([], 0, tl.uint64)
    c3 = tl.full([], 0, tl.uint64)
    for _ in tl.static_range(10):
        first = c0 * tl.full([], 0xD2511F53, tl.uint64)
        second = c2 * tl.full([], 0xCD9E8D57, tl.uint64)
        c0 = (second >> 32) ^ c1 ^ k0
        c1 = second & low
        c2 = (first >> 32) ^ c3 ^ k1
        c3 = first & low
        k0 = (k0 + tl.full([], 0x9E3779B9, tl.uint64)) & low
        k1 = (k1 + tl.full([], 0xBB67AE85, tl.uint64)) & low
    bits = ((c0 << 32) | c1) >> 11
    return bits.to(tl.float64) * 1.1102230246251565e-16  # 2 ** -53


@triton.jit
def _masses(
    source: tl.tensor,
    first: int,
    count: int,
    temperature: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    least: tl.tensor,
    top_p: tl.tensor,
    before: tl.tensor,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the probabilities that are kept of one tile, and the mass up to its end."""
    at = first + tl.arange(0, TILE)
    logits = tl.load(source + at, mask=at < count, other=float("-inf"))
    probabilities = tl.exp(logits / temperature - peak) / total
    passed = before + tl.cumsum(probabilities, axis=0) - probabilities
    # The first token always stays.
    is_kept = ((passed < top_p) | (at == 0)) & (probabilities >= least)
    return tl.where(is_kept, probabilities, 0.0), before + tl.sum(probabilities, axis=0)


@triton.jit
def _draw(
    logits: tl.tensor,
    values: tl.tensor,
    ids: tl.tensor,
    greedy: tl.tensor,
    temperatures: tl.tensor,
    top_ks: tl.tensor,
    top_ps: tl.tensor,
    min_ps: tl.tensor,
    seeds: tl.tensor,
    positions: tl.tensor,
    out: tl.tensor,
    vocab_size: int,
    num_candidates: int,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    if temperature == 0.0:
        tl.store(out + row, tl.load(greedy + row))
        return
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    has_top_k = (top_k > 0) & (top_k < vocab_size)
    is_whole = (top_p >= 1.0) & (has_top_k == 0)
    top_p = tl.where(top_p >= 1.0, float("inf"), top_p)
    own_logits = logits + row * vocab_size
    peak = tl.load(values + row * num_candidates) / temperature
    # What a probability is a part of: the whole vocabulary, or the k most likely.
    summed = tl.where(has_top_k, values + row * num_candidates, own_logits)
    num_summed = tl.where(has_top_k, tl.minimum(top_k, num_candidates), vocab_size).to(tl.int32)
    total = tl.full([], 0.0, tl.float32)
    for first in range(0, num_summed, TILE):
        at = first + tl.arange(0, TILE)
        x = tl.load(summed + at, mask=at < num_summed, other=float("-inf"))
        total += tl.sum(tl.exp(x / temperature - peak), axis=0)
    source = tl.where(is_whole, own_logits, values + row * num_candidates)
    count = tl.where(has_top_k, num_summed, tl.where(is_whole, vocab_size, num_candidates))
    count = count.to(tl.int32)
    least = tl.load(min_ps + row) / total  # the most likely one has 1 / total
    before = tl.full([], 0.0, tl.float32)
    mass = tl.full([], 0.0, tl.float64)
    for first in range(0, count, TILE):
        kept, before = _masses(
            source, first, count, temperature, peak, total, least, top_p, before, TILE
        )
        mass += tl.sum(kept.to(tl.float64), axis=0)
    target = mass * _uniform(tl.load(seeds + row), tl.load(positions + row))
    before = tl.full([], 0.0, tl.float32)
    reached = tl.full([], 0.0, tl.float64)
    index = tl.full([], 0, tl.int32)
    for first in range(0, count, TILE):
        kept, before = _masses(
            source, first, count, temperature, peak, total, least, top_p, before, TILE
        )
        cumulative = reached + tl.cumsum(kept.to(tl.float64), axis=0)
        at = first + tl.arange(0, TILE)
        index += tl.sum(((cumulative <= target) & (at < count)).to(tl.int32), axis=0)
        reached += tl.sum(kept.to(tl.float64), axis=0)
    index = tl.minimum(index, count - 1)
    chosen = tl.load(ids + row * num_candidates + tl.where(is_whole, 0, index))
    tl.store(out + row, tl.where(is_whole, index.to(tl.int64), chosen))


def draw(
    logits: Tensor,
    candidates: tuple[Tensor, Tensor],
    greedy: Tensor,
    *,
    temperatures: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    min_ps: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """Return one token id per row of logits (num_rows, vocab_size) float32, as int64.

    candidates are the largest logits of each row, descending, and their int64 ids, (num_rows,
    num_candidates); they hold top_k tokens, or the whole vocabulary where only top_p is set.
    greedy (num_rows,) int64 is for rows of temperature 0. temperatures, top_ps, min_ps are float32,
    top_ks, seeds (modulo 2**64) and positions int64, all (num_rows,).
    """
    values, ids = candidates
    for tensor in (logits, values, ids):
        assert tensor.is_contiguous(), f"strides {tensor.stride()}"
    out = torch.empty_like(greedy)
    _draw[(logits.shape[0],)](
        logits,
        values,
        ids,
        greedy,
        temperatures,
        top_ks,
        top_ps,
        min_ps,
        seeds,
        positions,
        out,
        logits.shape[1],
        values.shape[1],
        TILE=_TILE,
        num_warps=4,
    )
    return out
