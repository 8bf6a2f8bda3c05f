"""RMSNorm, with the addition to the residual stream that comes before it.

One program per token. All in float32, rounded once at the end: with a weight that is 1 + w already
this is the zero-centred form as well. The sum that goes back to the residual stream is rounded to
its dtype first, and the rounded sum is normed, as in the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_rms_norm(
    delta: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    size: int,
    eps: float,
    HAS_DELTA: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    inside = columns < size
    x = tl.load(residual + row * size + columns, mask=inside, other=0.0)
    if HAS_DELTA:
        added = tl.load(delta + row * size + columns, mask=inside, other=0.0)
        x = (x.to(tl.float32) + added.to(tl.float32)).to(x.dtype)
        tl.store(residual + row * size + columns, x, mask=inside)
    x = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + columns, (x * inverse * factor).to(out.dtype.element_ty), inside)


def add_rms_norm(delta: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add `delta` to `residual` in place, return the normed sum; without `delta` only norm.

    delta, residual (num_tokens, size), contiguous, one dtype; weight (size,) of any float dtype.
    """
    num_tokens, size = residual.shape
    assert residual.is_contiguous(), f"residual has strides {residual.stride()}"
    assert delta is None or (delta.shape == residual.shape and delta.is_contiguous()), "delta"
    out = torch.empty_like(residual)
    tile = triton.next_power_of_2(size)
    _add_rms_norm[(num_tokens,)](
        residual if delta is None else delta,
        residual,
        weight,
        out,
        size,
        eps,
        HAS_DELTA=delta is not None,
        TILE=tile,
        num_warps=min(16, max(1, tile // 512)),
    )
    return out
