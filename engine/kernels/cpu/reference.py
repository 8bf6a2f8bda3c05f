"""What the native kernels compute, in plain torch: the definition the tests hold them to.

Used by tests only. `linear` has the same bits as the kernels; the other operations agree with them
to float32 rounding.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

BLOCK: Final = 32
# Below it 127 / largest would overflow; such a block counts as zeros.
SMALLEST: Final = 1e-30


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 values and float32 scales (num_tokens, in / 32[, 32]) with x about q * scale.

    The scale is largest / 127, or NaN for a block that holds NaN or infinity.
    """
    blocks = x.reshape(x.shape[0], -1, BLOCK)
    largest = blocks.abs().amax(-1)
    is_poisoned = ~blocks.isfinite().all(-1)
    is_zero = is_poisoned | (largest < SMALLEST)
    inverse = torch.where(is_zero, 0.0, 127.0 / largest)
    values = torch.where(is_zero[..., None], 0.0, blocks * inverse[..., None]).round()
    scale = torch.where(is_zero, 0.0, largest / 127.0)
    return values.to(torch.int8), torch.where(is_poisoned, torch.nan, scale)


def linear(integers: Tensor, scales: Tensor, minima: Tensor | None, x: Tensor) -> Tensor:
    """Return (num_tokens, out) as the kernels add it up, bit by bit.

    The weight is integers (out, in) times scales (out, in / size), plus minima (out, in / 32);
    size is 32, or 16 for types that scale the halves of a block. Integer sums are exact in
    float32; every other product and sum is rounded once, blocks in ascending order.
    """
    values, x_scale = quantize_activation(x)
    num_tokens, num_blocks = x_scale.shape
    scales = scales.reshape(scales.shape[0], num_blocks, -1)
    parts = scales.shape[-1]  # 1, or 2 halves
    shape = (-1, num_blocks, parts, BLOCK // parts)
    out = torch.zeros(num_tokens, integers.shape[0])
    blocks = integers.reshape(shape).float()
    token_blocks = values.reshape(shape).float()
    x_sum = values.reshape(num_tokens, num_blocks, BLOCK).float().sum(-1)
    for b in range(num_blocks):
        sums = torch.einsum("rpk,tpk->ptr", blocks[:, b], token_blocks[:, b])
        token_scale = x_scale[:, b, None]
        terms = [scales[:, b, part] * token_scale * sums[part] for part in range(parts)]
        term = terms[0] if parts == 1 else terms[0] + terms[1]
        if minima is not None:
            term = term + minima[:, b] * (x_scale[:, b] * x_sum[:, b])[:, None]
        out = out + term
    return out
