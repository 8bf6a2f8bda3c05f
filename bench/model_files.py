"""Makes the benchmark's model files: random weights of a real model's shape, in any GGUF format.

Used by `bench.cpu` and `bench.load`. The bfloat16 file is written here, the quantised ones by
llama.cpp from it, so that they have its usual mix of types. Speed does not depend on the numbers.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import gguf
import numpy as np

# The numbers of llama.cpp's llama_ftype.
FILE_TYPES: Final = {
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q4_K_M": 15,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
}
FORMATS: Final = ("BF16", *FILE_TYPES)


@dataclass(frozen=True)
class LinearShape:
    """Gated DeltaNet in three layers of four: heads, and the size of all of them."""

    key_heads: int
    value_heads: int
    head_dim: int
    conv_kernel: int = 4

    @property
    def key_size(self) -> int:
        """Width of all K heads."""
        return self.key_heads * self.head_dim

    @property
    def value_size(self) -> int:
        """Width of all V heads."""
        return self.value_heads * self.head_dim


@dataclass(frozen=True)
class ExpertShape:
    """A mixture of experts in every layer."""

    count: int
    used: int
    intermediate: int


@dataclass(frozen=True)
class Shape:
    """The sizes of a model with a tied head; `linear`: a qwen35, `experts`: a qwen3moe."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    linear: LinearShape | None = None
    experts: ExpertShape | None = None

    @property
    def architecture(self) -> str:
        """As GGUF files spell it."""
        return "qwen35" if self.linear else "qwen3moe" if self.experts else "qwen3"


QWEN3_0_6B: Final = Shape("qwen3-0.6b", 1024, 28, 16, 8, 128, 3072, 151936)
QWEN3_5_0_8B: Final = Shape(
    "qwen3.5-0.8b", 1024, 24, 8, 2, 256, 3584, 248320, linear=LinearShape(16, 16, 128)
)
# No real model: the proportions of Qwen3-30B-A3B, in a size that a small machine holds.
QWEN3_MOE: Final = Shape(
    "qwen3moe-1.2b-a0.3b", 1024, 12, 16, 4, 128, 3072, 49152, experts=ExpertShape(40, 4, 768)
)


def model_file(folder: Path, shape: Shape, file_format: str, driver: Path) -> Path:
    """Return the GGUF file of the shape in the format, made first when it is missing."""
    target = folder / f"{shape.name}-{file_format}.gguf"
    if target.is_file():
        return target
    partial = target.with_suffix(".partial")
    if file_format == "BF16":
        folder.mkdir(parents=True, exist_ok=True)
        _write_bfloat16(partial, shape)
    else:
        source = model_file(folder, shape, "BF16", driver)
        number = str(FILE_TYPES[file_format])
        command = [str(driver), "quantize", str(source), str(partial), number]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    partial.rename(target)
    return target


def _write_bfloat16(path: Path, shape: Shape) -> None:
    tensors = _Tensors(path, shape)
    for layer in range(shape.layers):
        tensors.add_layer(layer)
    tensors.close()


class _Tensors:
    """Writes the metadata when made, then one layer after the other."""

    def __init__(self, path: Path, shape: Shape) -> None:
        self._shape = shape
        self._random = np.random.default_rng(0)
        self._writer = gguf.GGUFWriter(str(path), shape.architecture)
        self._add_metadata()
        self._matrix("token_embd", shape.vocab, shape.hidden)
        self._vector("output_norm.weight", np.ones(shape.hidden))

    def add_layer(self, layer: int) -> None:
        """Add the tensors of one layer."""
        shape, prefix = self._shape, f"blk.{layer}."
        self._vector(prefix + "attn_norm.weight", np.ones(shape.hidden))
        if shape.linear is not None and (layer + 1) % 4:
            self._add_delta_net(prefix, shape.linear)
        else:
            self._add_attention(prefix)
        norm = "post_attention_norm" if shape.linear else "ffn_norm"
        self._vector(f"{prefix}{norm}.weight", np.ones(shape.hidden))
        if shape.experts is None:
            self._matrix(prefix + "ffn_gate", shape.intermediate, shape.hidden)
            self._matrix(prefix + "ffn_up", shape.intermediate, shape.hidden)
            self._matrix(prefix + "ffn_down", shape.hidden, shape.intermediate)
            return
        count, size = shape.experts.count, shape.experts.intermediate
        router = self._random.standard_normal((count, shape.hidden)) * 0.02
        self._vector(prefix + "ffn_gate_inp.weight", router)
        self._matrix(prefix + "ffn_gate_exps", count, size, shape.hidden)
        self._matrix(prefix + "ffn_up_exps", count, size, shape.hidden)
        self._matrix(prefix + "ffn_down_exps", count, shape.hidden, size)

    def close(self) -> None:
        """Write the file."""
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_tensors_to_file()
        self._writer.close()

    def _add_metadata(self) -> None:
        shape, writer = self._shape, self._writer
        writer.add_name(shape.name)
        writer.add_context_length(40960)
        writer.add_embedding_length(shape.hidden)
        writer.add_block_count(shape.layers)
        writer.add_feed_forward_length(shape.intermediate)
        writer.add_head_count(shape.heads)
        writer.add_head_count_kv(shape.kv_heads)
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
        writer.add_rope_freq_base(1e6)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_vocab_size(shape.vocab)
        writer.add_tokenizer_model("none")
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
        if shape.experts is not None:
            writer.add_expert_count(shape.experts.count)
            writer.add_expert_used_count(shape.experts.used)
            writer.add_expert_feed_forward_length(shape.experts.intermediate)
        if shape.linear is not None:
            writer.add_rope_dimension_count(shape.head_dim // 4)
            writer.add_rope_dimension_sections([11, 11, 10, 0])
            writer.add_ssm_conv_kernel(shape.linear.conv_kernel)
            writer.add_ssm_state_size(shape.linear.head_dim)
            writer.add_ssm_group_count(shape.linear.key_heads)
            writer.add_ssm_time_step_rank(shape.linear.value_heads)
            writer.add_ssm_inner_size(shape.linear.value_size)
            writer.add_full_attention_interval(4)

    def _add_attention(self, prefix: str) -> None:
        shape = self._shape
        attended, kv_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        gates = 2 if shape.linear else 1  # per query element, beside the query
        self._matrix(prefix + "attn_q", attended * gates, shape.hidden)
        self._matrix(prefix + "attn_k", kv_size, shape.hidden)
        self._matrix(prefix + "attn_v", kv_size, shape.hidden)
        self._vector(prefix + "attn_q_norm.weight", np.ones(shape.head_dim))
        self._vector(prefix + "attn_k_norm.weight", np.ones(shape.head_dim))
        self._matrix(prefix + "attn_output", shape.hidden, attended)

    def _add_delta_net(self, prefix: str, linear: LinearShape) -> None:
        hidden, heads = self._shape.hidden, linear.value_heads
        conv_size = 2 * linear.key_size + linear.value_size
        self._matrix(prefix + "attn_qkv", conv_size, hidden)
        self._matrix(prefix + "attn_gate", linear.value_size, hidden)
        self._matrix(prefix + "ssm_beta", heads, hidden)
        self._matrix(prefix + "ssm_alpha", heads, hidden)
        conv = self._random.standard_normal((conv_size, linear.conv_kernel)) * 0.5
        self._vector(prefix + "ssm_conv1d.weight", conv)
        self._vector(prefix + "ssm_dt.bias", np.zeros(heads))
        self._vector(prefix + "ssm_a", np.full(heads, -0.05))
        self._vector(prefix + "ssm_norm.weight", np.ones(linear.head_dim))
        self._matrix(prefix + "ssm_out", hidden, linear.value_size)

    def _matrix(self, name: str, *shape: int) -> None:
        floats = self._random.standard_normal(shape, dtype=np.float32) * 0.02
        halves = (floats.view(np.uint32) >> 16).astype(np.uint16)
        kind = gguf.GGMLQuantizationType.BF16
        stored = halves.view(np.uint8)
        self._writer.add_tensor(f"{name}.weight", stored, raw_shape=stored.shape, raw_dtype=kind)

    def _vector(self, name: str, values: np.ndarray) -> None:
        self._writer.add_tensor(name, values.astype(np.float32))
