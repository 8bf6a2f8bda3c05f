"""Engines over random weights of real models' shapes, made on the device without any file."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from cortexd.models import LinearAttentionSpec, ModelSpec, RopeSpec
from cortexd.settings import Engine as EngineSettings
from engine.engine import Engine
from engine.formats.ggml import GGMLType
from engine.layers.linear import Backend, Weight
from engine.loading.loader import Weights
from engine.loading.stored_tensors import StoredRows, StoredTensors
from engine.models.registry import REGISTRY, load_class
from engine.quant.tensor import QuantizedTensor
from engine.specs.tensor_plan import HEAD

# Where the float16 scales of a block stand: random bytes there would be infinite or not a number.
_SCALES: Final = {GGMLType.Q4_K: (0, 2), GGMLType.Q6_K: (208,)}


class RandomTensors(StoredTensors):
    """Random numbers in place of a checkpoint's, made on the device when a layer asks for them."""

    def __init__(
        self, spec: ModelSpec, device: torch.device, dtype: torch.dtype, quant: GGMLType | None
    ) -> None:
        """Make matrices dense, or of random blocks of `quant`; the head is then Q6_K."""
        self.in_situ = None
        self._device = device
        self._dtype = dtype
        self._quant = quant
        self._planned = REGISTRY[spec.model_type].plan(spec).required

    def __repr__(self) -> str:
        return f"RandomTensors({self._quant}, {self._dtype})"

    def kind(self, name: str) -> object:
        """Return the one type that all matrices have."""
        return self._quant

    def matrix(self, part: StoredRows, columns: int) -> list[Weight]:
        """Return a random matrix (num_rows, columns)."""
        shape = part.num_rows, columns
        if self._quant is None or part.is_exact:
            weight = torch.empty(shape, dtype=self._dtype, device=self._device)
            return [weight.normal_(std=columns**-0.5)]
        return [self._blocks(*shape, GGMLType.Q6_K if part.name == HEAD else self._quant)]

    def numbers(self, name: str) -> Tensor:
        """Return random numbers, around 1 for norms, around 0 otherwise."""
        values = torch.randn(math.prod(self._planned[name]), device=self._device) * 0.1
        return values + 1 if "norm" in name else values

    def own(self, weight: Weight, dtype: torch.dtype | None) -> Weight:
        """Return what was made here, and on the device."""
        return weight

    def rope_factors(self) -> Tensor | None:
        """Return None: no file, no factors."""
        return None

    def _blocks(self, rows: int, columns: int, quant: GGMLType) -> QuantizedTensor:
        shape = (rows, columns // quant.block_elements, quant.block_bytes)
        blocks = torch.randint(0, 256, shape, dtype=torch.uint8, device=self._device)
        scale = torch.full((1,), 1e-4, dtype=torch.float16, device=self._device).view(torch.uint8)
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
    stored = RandomTensors(spec, device, dtype, quant)
    weights = Weights(stored, spec, device=device, dtype=dtype, backend=backend)
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
