"""Engines over random weights of real models' shapes, made on the device without any file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from cortexd.models import LinearAttentionSpec, ModelSpec, RopeSpec
from cortexd.settings import Engine as EngineSettings
from engine.engine import Engine
from engine.formats.ggml import GGMLType
from engine.layers.embedding import Embedding
from engine.layers.linear import Backend, Linear, Weight
from engine.models.registry import load_class
from engine.quant.tensor import QuantizedTensor
from engine.stored_tensors import RowSelection

# Where the float16 scales of a block stand: random bytes there would be infinite or not a number.
_SCALES: Final = {GGMLType.Q4_K: (0, 2), GGMLType.Q6_K: (208,)}


class RandomWeights:
    """What the models ask of `engine.loader.Weights`, without a checkpoint."""

    has_native_layers = False

    def __init__(
        self,
        spec: ModelSpec,
        device: torch.device,
        dtype: torch.dtype,
        backend: Backend,
        quant: GGMLType | None = None,
    ) -> None:
        """Make matrices dense, or of random blocks of `quant`; the head is then Q6_K."""
        self.spec = spec
        self.device = device
        self.dtype = dtype
        self.backend: Backend = backend
        self.memory_bytes = 0
        self._quant = quant

    def linear(
        self,
        name: str,
        out_features: int,
        in_features: int,
        bias_name: str | None = None,
        *,
        is_exact: bool = False,
        sums: bool = True,
    ) -> Linear:
        """Return a random layer."""
        return self._layer(out_features, in_features, None if is_exact else self._quant)

    def merged_linear(
        self,
        names: Sequence[str],
        out_features: Sequence[int],
        in_features: int,
        bias_names: Sequence[str | None] | None = None,
        *,
        selections: Sequence[RowSelection] | None = None,
        is_exact: Sequence[bool] | None = None,
    ) -> Linear:
        """Return one random layer over all parts."""
        return self._layer(sum(out_features), in_features, self._quant)

    def embedding(self, name: str, rows: int, columns: int) -> Embedding:
        """Return a random embedding."""
        return Embedding(self._dense(rows, columns), dtype=self.dtype)

    def head(self, embedding: Embedding) -> Linear:
        """Return the embedding's matrix when tied, one of its own otherwise."""
        if self.spec.tie_word_embeddings:
            return embedding.as_linear()
        quant = None if self._quant is None else GGMLType.Q6_K
        return self._layer(self.spec.vocab_size, self.spec.hidden_size, quant)

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return random numbers."""
        return self.vector(name, math.prod(shape), dtype).view(shape)

    def vector(self, name: str, size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return numbers around 1 for norms, around 0 otherwise."""
        values = torch.randn(size, device=self.device) * 0.1
        return (values + 1 if "norm" in name else values).to(dtype or self.dtype)

    def rope_factors(self) -> Tensor | None:
        """Return None: no file, no factors."""
        return None

    def _layer(self, rows: int, columns: int, quant: GGMLType | None) -> Linear:
        weight: Weight = (
            self._dense(rows, columns) if quant is None else self._blocks(rows, columns, quant)
        )
        linear = Linear(weight, dtype=self.dtype, backend=self.backend)
        self.memory_bytes += linear.num_bytes
        return linear

    def _dense(self, rows: int, columns: int) -> Tensor:
        weight = torch.empty(rows, columns, dtype=self.dtype, device=self.device)
        return weight.normal_(std=columns**-0.5)

    def _blocks(self, rows: int, columns: int, quant: GGMLType) -> QuantizedTensor:
        shape = (rows, columns // quant.block_elements, quant.block_bytes)
        blocks = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        scale = torch.full((1,), 1e-4, dtype=torch.float16, device=self.device).view(torch.uint8)
        for offset in _SCALES[quant]:
            blocks[:, :, offset : offset + 2] = scale
        return QuantizedTensor(quant, (rows, columns), blocks.flatten(1))


def make_engine(
    spec: ModelSpec,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    backend: Backend = "triton",
    quant: GGMLType | None = None,
    **settings: object,
) -> Engine:
    """Return an engine over random weights."""
    weights = RandomWeights(spec, device, dtype, backend, quant)
    with torch.inference_mode():
        model = load_class(spec.model_type)(spec, weights)
        return Engine(
            model,
            spec,
            EngineSettings(**settings),  # type: ignore[arg-type]
            device=device,
            dtype=dtype,
            weight_bytes=weights.memory_bytes,
            capturable=model.fused,
        )


def _qwen3(hidden: int, intermediate: int, num_layers: int, heads: tuple[int, int]) -> ModelSpec:
    return ModelSpec(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=num_layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=128,
        rms_norm_eps=1e-6,
        max_position_embeddings=40960,
        rope=RopeSpec(theta=1e6),
        tie_word_embeddings=hidden < 4096,
    )


QWEN3_0_6B: Final = _qwen3(1024, 3072, 28, (16, 8))
QWEN3_8B: Final = _qwen3(4096, 12288, 36, (32, 8))
QWEN3_5_27B: Final = ModelSpec(
    model_type="qwen3_5",
    architecture="Qwen3_5ForCausalLM",
    vocab_size=248320,
    hidden_size=5120,
    intermediate_size=17408,
    num_hidden_layers=64,
    num_attention_heads=24,
    num_key_value_heads=4,
    head_dim=256,
    rms_norm_eps=1e-6,
    max_position_embeddings=40960,
    rope=RopeSpec(theta=1e7, partial_rotary_factor=0.25),
    linear_layers=tuple(layer for layer in range(64) if (layer + 1) % 4),
    linear_attention=LinearAttentionSpec(
        num_key_heads=16, num_value_heads=48, key_head_dim=128, value_head_dim=128
    ),
)
