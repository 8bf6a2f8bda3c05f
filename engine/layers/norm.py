"""Root-mean-square normalisation, as llama and qwen3 use it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


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
