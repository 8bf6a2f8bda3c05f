"""Runs of tokens through the gated delta rule, chunk by chunk: two kernels and a gated norm.

The first, parallel over chunks, solves (I + L) [U | W] = [beta V | beta exp(G) K] by forward
substitution. The second, one program per row, V head and slice of the values, carries S from chunk
to chunk: P = U - W S, O = (exp(G) Q) S + (Q K^T . D) P, S <- exp(G_end) S + (exp(G_end - G) K)^T P.
All in float32. On CUDA the products use three TF32 passes, which keeps float32's accuracy; the
substitution uses none.

Source: "Gated Delta Networks" (arXiv 2412.06464), chunked form with the UT transform.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.delta_heads import (
    DeltaShape,
    HeadInputs,
    HeadWeights,
    SlotStates,
    decay_of,
    gated_norm,
    key_head_of,
    l2_normalized,
    sigmoid,
)
from engine.kernels.triton.launch import flags, tile

# With 64 tokens the tiles would not fit into the 99 KiB of shared memory that Ada and Ampere have.
CHUNK: Final = 32
# Slices of the values per program: more run at once, and each keeps less of S in registers.
_VALUE_SLICE: Final = 32


@triton.jit
def _head_rows(
    mixed: tl.tensor,
    tokens: tl.tensor,
    exists: tl.tensor,
    column: int,
    conv_size: int,
    SIZE: tl.constexpr,
    SIZE_TILE: tl.constexpr,
) -> tl.tensor:
    """Load (num_tokens, size) of one head as float32; what does not exist is 0."""
    dims = tl.arange(0, SIZE_TILE)
    return tl.load(
        mixed + tokens[:, None] * conv_size + column + dims[None, :],
        mask=exists[:, None] & (dims < SIZE)[None, :],
        other=0.0,
    ).to(tl.float32)


@triton.jit
def _pairwise_decay(total: tl.tensor, CHUNK: tl.constexpr) -> tl.tensor:
    """Return exp(G_i - G_j) for i >= j, else 0; masked before exp, which would overflow."""
    index = tl.arange(0, CHUNK)
    not_later = index[:, None] >= index[None, :]
    difference = tl.where(not_later, total[:, None] - total[None, :], 0.0)
    return tl.where(not_later, tl.exp(difference), 0.0)


@triton.jit
def _solve_chunk(
    mixed: tl.tensor,
    b: tl.tensor,
    a: tl.tensor,
    rate: tl.tensor,
    bias: tl.tensor,
    chunk_rows: tl.tensor,
    chunk_firsts: tl.tensor,
    query_starts: tl.tensor,
    decays: tl.tensor,
    new_values: tl.tensor,
    seen_keys: tl.tensor,
    b_stride: int,
    a_stride: int,
    num_key_heads: int,
    num_value_heads: int,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    TILED: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(chunk_rows + chunk)
    end = tl.load(query_starts + row + 1).to(tl.int64)
    index = tl.arange(0, CHUNK)
    tokens = tl.load(query_starts + row) + tl.load(chunk_firsts + chunk) + index
    exists = tokens < end
    key_head = key_head_of(head, num_key_heads, num_value_heads, TILED)
    key_size = num_key_heads * KEY_DIM
    conv_size = 2 * key_size + num_value_heads * VALUE_DIM
    # A token that does not exist has beta, decay, k and v of 0 and leaves S as it is.
    key = _head_rows(
        mixed, tokens, exists, key_size + key_head * KEY_DIM, conv_size, KEY_DIM, KEY_TILE
    )
    key = l2_normalized(key)
    value = _head_rows(
        mixed, tokens, exists, 2 * key_size + head * VALUE_DIM, conv_size, VALUE_DIM, VALUE_TILE
    )
    stored_b = tl.load(b + tokens * b_stride + head, mask=exists, other=0.0)
    beta = tl.where(exists, sigmoid(stored_b.to(tl.float32)).to(b.dtype.element_ty), 0.0)
    beta = beta.to(tl.float32)
    stored_a = tl.load(a + tokens * a_stride + head, mask=exists, other=0.0)
    decay = decay_of(stored_a, tl.load(rate + head), tl.load(bias + head))
    total = tl.cumsum(tl.where(exists, decay, 0.0), axis=0)
    tl.store(decays + tokens * num_value_heads + head, total, mask=exists)

    weighted_key = key * beta[:, None]
    system = tl.dot(weighted_key, tl.trans(key), input_precision="tf32x3")
    system *= _pairwise_decay(total, CHUNK)
    # The inverse of I + L, row by row from the rows above; never by powers of L, which explode
    # when keys repeat.
    inverse = tl.where(index[:, None] == index[None, :], 1.0, 0.0)
    for i in range(1, CHUNK):
        below = tl.sum(tl.where(index[:, None] == i, system, 0.0), axis=0)
        below = tl.where(index < i, below, 0.0)
        update = tl.sum(below[:, None] * inverse, axis=0)
        inverse = tl.where(index[:, None] == i, inverse - update[None, :], inverse)
    solved_values = tl.dot(inverse, value * beta[:, None], input_precision="tf32x3")
    solved_keys = tl.dot(inverse, weighted_key * tl.exp(total)[:, None], input_precision="tf32x3")
    at = tokens * num_value_heads + head
    values, keys = tl.arange(0, VALUE_TILE), tl.arange(0, KEY_TILE)
    tl.store(
        new_values + at[:, None] * VALUE_DIM + values[None, :],
        solved_values,
        mask=exists[:, None] & (values < VALUE_DIM)[None, :],
    )
    tl.store(
        seen_keys + at[:, None] * KEY_DIM + keys[None, :],
        solved_keys,
        mask=exists[:, None] & (keys < KEY_DIM)[None, :],
    )


@triton.jit
def _carry_state(
    mixed: tl.tensor,
    decays: tl.tensor,
    new_values: tl.tensor,
    seen_keys: tl.tensor,
    query_starts: tl.tensor,
    states: tl.tensor,
    slots: tl.tensor,
    is_fresh: tl.tensor,
    out: tl.tensor,
    scale: float,
    num_key_heads: int,
    num_value_heads: int,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_TILE: tl.constexpr,
    VALUES: tl.constexpr,
    TILED: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    head = tl.program_id(1)
    values = tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    has_value = values < VALUE_DIM
    keys = tl.arange(0, KEY_TILE)
    has_key = keys < KEY_DIM
    key_head = key_head_of(head, num_key_heads, num_value_heads, TILED)
    key_size = num_key_heads * KEY_DIM
    conv_size = 2 * key_size + num_value_heads * VALUE_DIM
    start = tl.load(query_starts + row).to(tl.int64)
    end = tl.load(query_starts + row + 1).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    at_state = states + (slot * num_value_heads + head) * KEY_DIM * VALUE_DIM
    at_state = at_state + keys[:, None] * VALUE_DIM + values[None, :]
    in_state = has_key[:, None] & has_value[None, :]
    fresh = tl.load(is_fresh + row).to(tl.int32)
    state = tl.load(at_state, mask=in_state & (fresh == 0), other=0.0)
    index = tl.arange(0, CHUNK)
    for first in range(start, end, CHUNK):
        tokens = first + index
        exists = tokens < end
        at = tokens * num_value_heads + head
        query = _head_rows(mixed, tokens, exists, key_head * KEY_DIM, conv_size, KEY_DIM, KEY_TILE)
        query = l2_normalized(query) * scale
        key = _head_rows(
            mixed, tokens, exists, key_size + key_head * KEY_DIM, conv_size, KEY_DIM, KEY_TILE
        )
        key = l2_normalized(key)
        # Behind the last token the sum of decays stays what it was at the last one.
        last = tl.minimum(first + CHUNK, end) - 1
        to_end = tl.load(decays + last * num_value_heads + head)
        total = tl.load(decays + at, mask=exists, other=0.0)
        total = tl.where(exists, total, to_end)
        in_values = exists[:, None] & has_value[None, :]
        written = tl.load(
            new_values + at[:, None] * VALUE_DIM + values[None, :], mask=in_values, other=0.0
        )
        seen = tl.load(
            seen_keys + at[:, None] * KEY_DIM + keys[None, :],
            mask=exists[:, None] & has_key[None, :],
            other=0.0,
        )
        written -= tl.dot(seen, state, input_precision="tf32x3")
        within = tl.dot(query, tl.trans(key), input_precision="tf32x3")
        within *= _pairwise_decay(total, CHUNK)
        attended = tl.dot(query * tl.exp(total)[:, None], state, input_precision="tf32x3")
        attended += tl.dot(within, written, input_precision="tf32x3")
        tl.store(
            out + at[:, None] * VALUE_DIM + values[None, :],
            attended.to(out.dtype.element_ty),
            mask=in_values,
        )
        to_write = key * tl.exp(to_end - total)[:, None]
        state = state * tl.exp(to_end)
        state += tl.dot(tl.trans(to_write), written, input_precision="tf32x3")
    tl.store(at_state, state, mask=in_state)


@triton.jit
def _gate(
    x: tl.tensor,
    gate: tl.tensor,
    weight: tl.tensor,
    eps: float,
    gate_stride: int,
    num_value_heads: int,
    VALUE_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEAD_TILE + tl.arange(0, HEAD_TILE)
    values = tl.arange(0, VALUE_TILE)
    inside = (heads < num_value_heads)[:, None] & (values < VALUE_DIM)[None, :]
    at = heads[:, None] * VALUE_DIM + values[None, :]
    own = x + token * num_value_heads * VALUE_DIM + at
    attended = tl.load(own, mask=inside, other=0.0)
    z = tl.load(gate + token * gate_stride + at, mask=inside, other=0.0)
    factor = tl.load(weight + values, mask=values < VALUE_DIM, other=0.0)
    normed = gated_norm(attended, z, factor[None, :], inside, VALUE_DIM, eps)
    tl.store(own, normed.to(attended.dtype), mask=inside)


def delta_prefill(
    heads: HeadInputs,
    weights: HeadWeights,
    states: SlotStates,
    shape: DeltaShape,
    query_starts: Tensor,
    chunks: Tensor,
    *,
    out: Tensor,
) -> None:
    """Advance rows of many tokens each and write the normed, gated output.

    Row i has the tokens query_starts[i]..query_starts[i + 1]-1. chunks (2, num_chunks) says for
    each chunk whose it is and its first token, counted from the row's; out (num_tokens,
    num_value_heads * value_dim).
    """
    heads.check()
    states.check()
    assert chunks.is_contiguous(), f"chunks have strides {chunks.stride()}"
    assert out.is_contiguous(), f"out has strides {out.stride()}"
    mixed, num_heads = heads.mixed, shape.num_value_heads
    decays = mixed.new_empty(len(mixed), num_heads, dtype=torch.float32)
    new_values = decays.new_empty(len(mixed), num_heads, shape.value_dim)
    seen_keys = decays.new_empty(len(mixed), num_heads, shape.key_dim)
    key_tile, value_tile = tile(shape.key_dim), tile(shape.value_dim)
    _solve_chunk[(chunks.shape[1], num_heads)](
        mixed,
        heads.b,
        heads.a,
        weights.decay_rate,
        weights.dt_bias,
        chunks[0],
        chunks[1],
        query_starts,
        decays,
        new_values,
        seen_keys,
        heads.b.stride(0),
        heads.a.stride(0),
        shape.num_key_heads,
        num_heads,
        **shape.constants,
        KEY_TILE=key_tile,
        VALUE_TILE=value_tile,
        CHUNK=CHUNK,
        num_warps=4,
        num_stages=1,
    )
    values = min(_VALUE_SLICE, value_tile)
    _carry_state[(states.slots.shape[0], num_heads, triton.cdiv(shape.value_dim, values))](
        mixed,
        decays,
        new_values,
        seen_keys,
        query_starts,
        states.states,
        states.slots,
        flags(states.is_fresh),
        out,
        shape.key_dim**-0.5,
        shape.num_key_heads,
        num_heads,
        **shape.constants,
        KEY_TILE=key_tile,
        VALUES=values,
        CHUNK=CHUNK,
        num_warps=4,
        num_stages=1,
    )
    head_tile = min(8, triton.next_power_of_2(num_heads))
    _gate[(len(mixed), triton.cdiv(num_heads, head_tile))](
        out,
        heads.gate,
        weights.norm,
        weights.eps,
        heads.gate.stride(0),
        num_heads,
        VALUE_DIM=shape.value_dim,
        HEAD_TILE=head_tile,
        VALUE_TILE=triton.next_power_of_2(shape.value_dim),
        num_warps=4,
    )
