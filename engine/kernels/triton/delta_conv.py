"""The causal convolution of Gated DeltaNet, with SiLU, over rows that keep their last inputs.

One program per tile of tokens and channels; a row's inputs before its first token of this step come
from its state slot. The tails are moved on by a second kernel: other programs still read them.
Sums in float32; the sum and SiLU are rounded to the model's dtype, as in the reference.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.launch import flags

_TOKENS: Final = 16
_CHANNELS: Final = 128


@triton.jit
def _input(
    mixed: tl.tensor,
    tail: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    mask: tl.tensor,
    is_fresh: tl.tensor,
    stride: int,
    num_channels: int,
    TAIL: tl.constexpr,
) -> tl.tensor:
    """Load the row's inputs at `tokens`; -1 is the last one that the tail holds."""
    from_tail = tokens < 0
    new = tl.load(
        mixed + tokens[:, None] * stride + channels[None, :],
        mask=mask & (tokens >= 0)[:, None],
        other=0.0,
    )
    old = tl.load(
        tail + (tokens + TAIL)[:, None] * num_channels + channels[None, :],
        mask=mask & from_tail[:, None] & (is_fresh == 0),
        other=0.0,
    )
    return tl.where(from_tail[:, None], old, new)


@triton.jit
def _convolve(
    mixed: tl.tensor,
    tails: tl.tensor,
    weight: tl.tensor,
    slots: tl.tensor,
    is_fresh: tl.tensor,
    query_starts: tl.tensor,
    out: tl.tensor,
    stride: int,
    num_channels: int,
    KERNEL: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    row = tl.program_id(2)
    start = tl.load(query_starts + row).to(tl.int64)
    num_tokens = (tl.load(query_starts + row + 1) - start).to(tl.int32)
    first = tl.program_id(0) * TOKENS
    if first >= num_tokens:
        return
    tail = tails + tl.load(slots + row).to(tl.int64) * (KERNEL - 1) * num_channels
    fresh = tl.load(is_fresh + row).to(tl.int32)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    tokens = first + tl.arange(0, TOKENS)
    mask = (tokens < num_tokens)[:, None] & (channels < num_channels)[None, :]
    own = mixed + start * stride
    total = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for offset in tl.static_range(KERNEL):
        at = tokens + (offset - KERNEL + 1)
        x = _input(own, tail, at, channels, mask, fresh, stride, num_channels, KERNEL - 1)
        factor = tl.load(
            weight + offset * num_channels + channels, mask=channels < num_channels, other=0.0
        )
        total += x.to(tl.float32) * factor[None, :]
    total = total.to(out.dtype.element_ty).to(tl.float32)
    activated = total / (1.0 + tl.exp(-total))
    target = out + (start + tokens)[:, None] * num_channels + channels[None, :]
    tl.store(target, activated.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _move_tails(
    mixed: tl.tensor,
    tails: tl.tensor,
    slots: tl.tensor,
    is_fresh: tl.tensor,
    query_starts: tl.tensor,
    stride: int,
    num_channels: int,
    TAIL: tl.constexpr,
    TAIL_TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    row = tl.program_id(1)
    start = tl.load(query_starts + row).to(tl.int64)
    num_tokens = (tl.load(query_starts + row + 1) - start).to(tl.int32)
    tail = tails + tl.load(slots + row).to(tl.int64) * TAIL * num_channels
    fresh = tl.load(is_fresh + row).to(tl.int32)
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    kept = tl.arange(0, TAIL_TILE)
    mask = (kept < TAIL)[:, None] & (channels < num_channels)[None, :]
    tokens = num_tokens - TAIL + kept
    own = mixed + start * stride
    x = _input(own, tail, tokens, channels, mask, fresh, stride, num_channels, TAIL)
    # The tile is written over what it was read from, by other threads of this program.
    tl.debug_barrier()
    tl.store(tail + kept[:, None] * num_channels + channels[None, :], x, mask=mask)


def convolve(
    mixed: Tensor,
    tails: Tensor,
    weight: Tensor,
    slots: Tensor,
    is_fresh: Tensor,
    query_starts: Tensor,
    max_query_len: int,
    *,
    out: Tensor,
) -> None:
    """Write the activated convolution of each row's tokens to `out`, and keep its last inputs.

    mixed (num_tokens, num_channels), tokens may be strided; tails (num_slots, kernel - 1,
    num_channels); weight (kernel, num_channels) float32; slots (num_rows,), is_fresh (num_rows,)
    bool; row i has the tokens query_starts[i]..query_starts[i + 1]-1; out (num_tokens,
    num_channels).
    """
    num_channels, num_rows, kernel = mixed.shape[1], slots.shape[0], weight.shape[0]
    assert mixed.stride(1) == 1, f"mixed has strides {mixed.stride()}"
    assert tails[0].is_contiguous(), f"tails have strides {tails.stride()}"
    assert out.is_contiguous(), f"out has strides {out.stride()}"
    num_blocks = triton.cdiv(num_channels, _CHANNELS)
    tokens = min(_TOKENS, triton.next_power_of_2(max_query_len))
    stride = mixed.stride(0)
    fresh = flags(is_fresh)
    _convolve[(triton.cdiv(max_query_len, tokens), num_blocks, num_rows)](
        mixed,
        tails,
        weight,
        slots,
        fresh,
        query_starts,
        out,
        stride,
        num_channels,
        KERNEL=kernel,
        TOKENS=tokens,
        CHANNELS=_CHANNELS,
        num_warps=4,
    )
    _move_tails[(num_blocks, num_rows)](
        mixed,
        tails,
        slots,
        fresh,
        query_starts,
        stride,
        num_channels,
        TAIL=kernel - 1,
        TAIL_TILE=triton.next_power_of_2(kernel - 1),
        CHANNELS=_CHANNELS,
        num_warps=4,
    )
