"""Root-mean-square normalisation: as llama and qwen3 have it, zero-centred, and gated.

They differ in where they round to the model's dtype and in what the weight is added to.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch.nn import functional


class Norm(Protocol):
    """x (..., size) → the same shape and dtype."""

    eps: float
    weight: Tensor

    def __call__(self, hidden: Tensor, /) -> Tensor: ...


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; mean and root in float32."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps
        self._shape = (weight.shape[-1],)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the normalised (..., size) in the dtype of `hidden`."""
        return functional.rms_norm(hidden, self._shape, self.weight, self.eps)


class HeadRMSNorm:
    """RMSNorm over head_dim, with one weight per head: norms Q and K heads in one call."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight  # (num_heads, head_dim)
        self.eps = eps
        self._shape = (weight.shape[-1],)

    def __call__(self, heads: Tensor) -> Tensor:
        """Return the normalised (num_tokens, num_heads, head_dim)."""
        return functional.rms_norm(heads, self._shape, None, self.eps).mul_(self.weight)


class ZeroCentredRMSNorm:
    """x / sqrt(mean(x^2) + eps) * (1 + w), all in float32, rounded once at the end."""

    def __init__(self, factor: Tensor, eps: float) -> None:
        """Take `factor` = 1 + w in float32: (size,), or (num_heads, head_dim) for Q and K heads."""
        self.weight = factor
        self.eps = eps
        self._shape = (factor.shape[-1],)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the normalised (..., size) in the dtype of `hidden`."""
        normed = functional.rms_norm(hidden.float(), self._shape, None, self.eps)
        return normed.mul_(self.weight).to(hidden.dtype)


class GatedRMSNorm:
    """RMSNorm times silu(gate): the norm first, the gate in float32 second."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps
        self._shape = (weight.shape[-1],)

    def __call__(self, hidden: Tensor, gate: Tensor) -> Tensor:
        """Return (..., size) in the dtype of `hidden`; `gate` has the same shape."""
        normed = functional.rms_norm(hidden.float(), self._shape, None, self.eps)
        weighted = normed.to(hidden.dtype) * self.weight
        return (weighted * functional.silu(gate.float())).to(hidden.dtype)
