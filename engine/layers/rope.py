"""Rotary position embedding: inverse frequencies of each rope type, cos/sin tables, rotation.

Element j of a head turns with element j + rotary_dim / 2. Angles are float32; cos and sin are cast
to the compute dtype. Tables are made once per step, for its positions.
Source: transformers 5.23 modeling_rope_utils (default, linear, llama3, yarn).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cortexd import errors
from cortexd.models import RopeSpec


class RotaryEmbedding:
    """Cos and sin of a step's positions, and the rotation of its Q and K heads."""

    def __init__(
        self,
        spec: RopeSpec,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        divisors: Tensor | None = None,
    ) -> None:
        """Take the spec and, from GGUF files with llama3 scaling, (rotary_dim / 2,) divisors."""
        self.rotary_dim = int(head_dim * spec.partial_rotary_factor)
        inverse, self.scale = inverse_frequencies(spec, self.rotary_dim)
        self.inverse = inverse.to(device) if divisors is None else inverse.to(device) / divisors
        self._dtype = dtype

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and signed sin, each (num_tokens, 1, rotary_dim), for int64 positions."""
        angles = torch.outer(positions.float(), self.inverse).unsqueeze(1)
        cos, sin = angles.cos() * self.scale, angles.sin() * self.scale
        # rotate_half(x) * sin == roll(x) * [-sin, sin]: the sign goes into the table.
        return (
            torch.cat([cos, cos], -1).to(self._dtype),
            torch.cat([-sin, sin], -1).to(self._dtype),
        )

    def rotate_(self, heads: Tensor, tables: tuple[Tensor, Tensor]) -> None:
        """Rotate (num_tokens, num_heads, head_dim) in place."""
        cos, sin = tables
        rotated = heads if self.rotary_dim == heads.shape[-1] else heads[..., : self.rotary_dim]
        rolled = torch.roll(rotated, self.rotary_dim // 2, -1)
        rotated.mul_(cos).addcmul_(rolled, sin)


def inverse_frequencies(spec: RopeSpec, rotary_dim: int) -> tuple[Tensor, float]:
    """Return (rotary_dim / 2,) float32 inverse frequencies and the factor on cos and sin."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    inverse = 1.0 / (spec.theta**exponents)
    match spec.rope_type:
        case "default":
            return inverse, 1.0
        case "linear":
            return inverse / spec.factor, 1.0
        case "llama3":
            return _llama3(spec, inverse), 1.0
        case "yarn":
            return _yarn(spec, inverse, rotary_dim)
        case other:
            raise errors.UnsupportedArchitecture(
                f'rope type "{other}" is not supported; supported: default, linear, llama3, yarn; '
                "see engine/layers/rope.py"
            )


def _llama3(spec: RopeSpec, inverse: Tensor) -> Tensor:
    """Keep short wavelengths, stretch long ones, blend between."""
    original = spec.original_max_position_embeddings
    wavelength = 2 * math.pi / inverse
    blend = (original / wavelength - spec.low_freq_factor) / (
        spec.high_freq_factor - spec.low_freq_factor
    )
    blended = (1 - blend) * inverse / spec.factor + blend * inverse
    long = wavelength > original / spec.low_freq_factor
    short = wavelength < original / spec.high_freq_factor
    return torch.where(long, inverse / spec.factor, torch.where(short, inverse, blended))


def _yarn(spec: RopeSpec, inverse: Tensor, rotary_dim: int) -> tuple[Tensor, float]:
    """Interpolate slow frequencies, keep fast ones, ramp between."""
    original = spec.original_max_position_embeddings

    def dimension_of(num_rotations: float) -> float:
        turns = original / (num_rotations * 2 * math.pi)
        return rotary_dim * math.log(turns) / (2 * math.log(spec.theta))

    low = max(math.floor(dimension_of(spec.beta_fast)), 0)
    high = min(math.ceil(dimension_of(spec.beta_slow)), rotary_dim - 1)
    span = max(high - low, 0.001)  # equal bounds would divide by zero
    kept = 1 - ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    scaled = inverse / spec.factor * (1 - kept) + inverse * kept
    default_scale = 0.1 * math.log(spec.factor) + 1.0 if spec.factor > 1 else 1.0
    return scaled, default_scale if spec.attention_factor is None else spec.attention_factor
