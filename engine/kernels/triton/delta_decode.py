"""One token of the gated delta rule per row, in place in the row's state slot, with the gated norm.

One program per row and V head: it holds the head's whole S in registers, so S is read once and
written once. S and all of its arithmetic are float32.

Source: "Gated Delta Networks" (arXiv 2412.06464), the recurrent form.
"""

from __future__ import annotations

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
from engine.kernels.triton.launch import flags


@triton.jit
def _step(
    mixed: tl.tensor,
    b: tl.tensor,
    a: tl.tensor,
    gate: tl.tensor,
    rate: tl.tensor,
    bias: tl.tensor,
    norm_weight: tl.tensor,
    states: tl.tensor,
    slots: tl.tensor,
    is_fresh: tl.tensor,
    out: tl.tensor,
    scale: float,
    eps: float,
    b_stride: int,
    a_stride: int,
    gate_stride: int,
    num_key_heads: int,
    num_value_heads: int,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    TILED: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    key_head = key_head_of(head, num_key_heads, num_value_heads, TILED)
    keys = tl.arange(0, KEY_TILE)
    values = tl.arange(0, VALUE_TILE)
    has_key = keys < KEY_DIM
    has_value = values < VALUE_DIM
    key_size = num_key_heads * KEY_DIM
    own = mixed + row * (2 * key_size + num_value_heads * VALUE_DIM)
    at_key = own + key_head * KEY_DIM + keys[None, :]
    # One row each, (1, key_dim): the helpers work on rows.
    q = tl.load(at_key, mask=has_key[None, :], other=0.0).to(tl.float32)
    k = tl.load(at_key + key_size, mask=has_key[None, :], other=0.0).to(tl.float32)
    q = tl.trans(l2_normalized(q) * scale)
    k = tl.trans(l2_normalized(k))
    v = tl.load(own + 2 * key_size + head * VALUE_DIM + values, mask=has_value, other=0.0)
    stored_b = tl.load(b + row * b_stride + head)
    beta = sigmoid(stored_b.to(tl.float32)).to(stored_b.dtype).to(tl.float32)
    decay = decay_of(tl.load(a + row * a_stride + head), tl.load(rate + head), tl.load(bias + head))
    slot = tl.load(slots + row).to(tl.int64)
    at = states + (slot * num_value_heads + head) * KEY_DIM * VALUE_DIM
    at = at + keys[:, None] * VALUE_DIM + values[None, :]
    inside = has_key[:, None] & has_value[None, :]
    fresh = tl.load(is_fresh + row).to(tl.int32)
    state = tl.load(at, mask=inside & (fresh == 0), other=0.0) * tl.exp(decay)
    remembered = tl.sum(k * state, axis=0)
    delta = beta * (v.to(tl.float32) - remembered)
    state += k * delta[None, :]
    tl.store(at, state, mask=inside)
    attended = tl.sum(q * state, axis=0)[None, :].to(out.dtype.element_ty)
    z = tl.load(gate + row * gate_stride + head * VALUE_DIM + values, mask=has_value, other=0.0)
    weight = tl.load(norm_weight + values, mask=has_value, other=0.0)
    normed = gated_norm(attended, z[None, :], weight[None, :], has_value[None, :], VALUE_DIM, eps)
    target = out + (row * num_value_heads + head) * VALUE_DIM + values[None, :]
    tl.store(target, normed.to(out.dtype.element_ty), mask=has_value[None, :])


def delta_decode(
    heads: HeadInputs, weights: HeadWeights, states: SlotStates, shape: DeltaShape, *, out: Tensor
) -> None:
    """Advance one token per row and write the normed, gated output.

    out (num_rows, num_value_heads * value_dim).
    """
    heads.check()
    states.check()
    assert out.is_contiguous(), f"out has strides {out.stride()}"
    key_tile = triton.next_power_of_2(shape.key_dim)
    value_tile = triton.next_power_of_2(shape.value_dim)
    _step[(heads.mixed.shape[0], shape.num_value_heads)](
        heads.mixed,
        heads.b,
        heads.a,
        heads.gate,
        weights.decay_rate,
        weights.dt_bias,
        weights.norm,
        states.states,
        states.slots,
        flags(states.is_fresh),
        out,
        shape.key_dim**-0.5,
        weights.eps,
        heads.b.stride(0),
        heads.a.stride(0),
        heads.gate.stride(0),
        shape.num_key_heads,
        shape.num_value_heads,
        **shape.constants,
        KEY_TILE=key_tile,
        VALUE_TILE=value_tile,
        # 16384 float32 of S at 128 x 128: 64 registers a thread.
        num_warps=8 if key_tile * value_tile >= 8192 else 2,
    )
