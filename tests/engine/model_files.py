"""Tiny model files for tests: GGUF through the gguf package's writer, and byte by byte."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from cortexd.models import LinearAttentionSpec, ModelFiles, ModelSpec, MoeSpec, RopeSpec
from engine.formats.gguf_names import gguf_name
from engine.models.registry import REGISTRY

STRING, ARRAY, UINT32, UINT8 = 8, 9, 4, 0

torch.set_num_threads(1)  # tiny matrices; several test runs share the machine


def gguf_string(text: str | bytes) -> bytes:
    """Return a GGUF string: u64 length and bytes."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


@dataclass
class RawTensor:
    """One entry of a handmade tensor table; `dims` is fastest first."""

    name: str = "t"
    dims: Sequence[int] = (32,)
    type_number: int = 0
    offset: int = 0
    num_dims: int | None = None

    def encode(self) -> bytes:
        """Return the entry's bytes."""
        num_dims = len(self.dims) if self.num_dims is None else self.num_dims
        return (
            gguf_string(self.name)
            + struct.pack(f"<I{len(self.dims)}Q", num_dims, *self.dims)
            + struct.pack("<IQ", self.type_number, self.offset)
        )


def raw_gguf(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    keys: Sequence[bytes] = (),
    tensors: Sequence[RawTensor] = (),
    num_keys: int | None = None,
    num_tensors: int | None = None,
    data: bytes = b"\0" * 128,
) -> bytes:
    """Return a handmade GGUF file; every field may lie."""
    header = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if num_tensors is None else num_tensors,
        len(keys) if num_keys is None else num_keys,
    )
    header += b"".join(keys) + b"".join(tensor.encode() for tensor in tensors)
    return header + b"\0" * (-len(header) % 32) + data


def write_gguf(
    path: Path,
    spec: ModelSpec,
    tensors: Mapping[str, tuple[np.ndarray, gguf.GGMLQuantizationType]],
    extra_keys: Mapping[str, Any] | None = None,
) -> ModelFiles:
    """Write tensors (canonical name → stored array, type) as a GGUF of `spec`.

    For llama the query and key rows are permuted as the converter does.
    """
    known = REGISTRY.get(spec.model_type)
    prefix = spec.model_type if known is None else known.gguf_name
    writer = gguf.GGUFWriter(str(path), prefix)
    writer.add_uint32(f"{prefix}.block_count", spec.num_hidden_layers + spec.num_draft_layers)
    writer.add_uint32(f"{prefix}.context_length", spec.max_position_embeddings)
    writer.add_uint32(f"{prefix}.embedding_length", spec.hidden_size)
    writer.add_uint32(f"{prefix}.feed_forward_length", spec.intermediate_size)
    writer.add_uint32(f"{prefix}.attention.head_count", spec.num_attention_heads)
    writer.add_uint32(f"{prefix}.attention.head_count_kv", spec.num_key_value_heads)
    writer.add_uint32(f"{prefix}.attention.key_length", spec.head_dim)
    writer.add_uint32(f"{prefix}.attention.value_length", spec.head_dim)
    writer.add_float32(f"{prefix}.attention.layer_norm_rms_epsilon", spec.rms_norm_eps)
    writer.add_float32(f"{prefix}.rope.freq_base", spec.rope.theta)
    extra_keys = extra_keys or {}
    for key, value in {**hybrid_keys(spec), **moe_keys(spec)}.items():
        if f"{prefix}.{key}" not in extra_keys:
            writer.add_uint32(f"{prefix}.{key}", value)
    for key, value in extra_keys.items():
        writer.add_key_value(key, value, _value_type(value))
    for name, (array, ggml_type) in tensors.items():
        stored = array
        if spec.model_type == "llama" and ".q_proj." in name:
            stored = permute_rows(array, spec.num_attention_heads)
        elif spec.model_type == "llama" and ".k_proj." in name:
            stored = permute_rows(array, spec.num_key_value_heads)
        is_canonical = name.startswith(("model.", "lm_head."))
        file_name = gguf_name(name, prefix) if is_canonical else name
        writer.add_tensor(file_name, stored, raw_dtype=ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelFiles(
        model_id="tiny", source="path", revision="", format="gguf", weights=(str(path),)
    )


def hybrid_keys(spec: ModelSpec) -> dict[str, int]:
    """Return the keys, without the architecture, of linear attention."""
    linear = spec.linear_attention
    if linear is None:
        return {}
    return {
        "full_attention_interval": spec.attention_layers[0] + 1,
        "ssm.conv_kernel": linear.conv_kernel,
        "ssm.state_size": linear.key_head_dim,
        "ssm.group_count": linear.num_key_heads,
        "ssm.time_step_rank": linear.num_value_heads,
        "ssm.inner_size": linear.value_size,
        "rope.dimension_count": int(spec.head_dim * spec.rope.partial_rotary_factor),
        "nextn_predict_layers": spec.num_draft_layers,
    }


def moe_keys(spec: ModelSpec) -> dict[str, int]:
    """Return the keys, without the architecture, of experts."""
    moe = spec.moe
    if moe is None:
        return {}
    keys = {
        "expert_count": moe.num_experts,
        "expert_used_count": moe.num_experts_per_tok,
        "expert_feed_forward_length": moe.intermediate_size,
    }
    if moe.shared_intermediate_size:
        keys["expert_shared_feed_forward_length"] = moe.shared_intermediate_size
    return keys


def family_spec(base: ModelSpec, model_type: str) -> ModelSpec:
    """Return `base` as a GGUF model of another family, with what that family has."""
    entry = REGISTRY[model_type]
    linear = LinearAttentionSpec(
        num_key_heads=2,
        num_value_heads=4,
        key_head_dim=8,
        value_head_dim=8,
        has_tiled_heads=entry.has_tiled_gguf_heads,
        projections="fused_ba" if model_type == "qwen3_next" else "separate",
    )
    moe = MoeSpec(
        num_experts=4,
        num_experts_per_tok=2,
        intermediate_size=32,
        shared_intermediate_size=32 if entry.is_hybrid else 0,
        expert_tensors="stacked",
    )
    partial = RopeSpec(theta=base.rope.theta, partial_rotary_factor=0.5)
    return msgspec.structs.replace(
        base,
        model_type=model_type,
        architecture=entry.gguf_name,
        qkv_bias=entry.has_qkv_bias,
        moe=moe if entry.has_experts else None,
        linear_attention=linear if entry.is_hybrid else None,
        linear_layers=tuple(range(base.num_hidden_layers - 1)) if entry.is_hybrid else (),
        has_folded_weights=entry.is_hybrid,
        rope=partial if entry.is_hybrid else base.rope,
    )


def _value_type(value: object) -> gguf.GGUFValueType:
    if isinstance(value, bool):
        return gguf.GGUFValueType.BOOL
    if isinstance(value, int):
        return gguf.GGUFValueType.UINT32
    if isinstance(value, float):
        return gguf.GGUFValueType.FLOAT32
    return gguf.GGUFValueType.STRING


def permute_rows(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder rows per head from half-split to interleaved, as the llama converter does."""
    halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def random_blocks(
    rng: np.random.Generator, ggml_type: gguf.GGMLQuantizationType, rows: int, columns: int
) -> np.ndarray:
    """Return (rows, row_bytes) random block bytes whose scales are finite float16 numbers."""
    elements, size = gguf.GGML_QUANT_SIZES[ggml_type]
    blocks = rng.integers(0, 256, (rows * columns // elements, size), dtype=np.uint8)
    for offset in SCALE_OFFSETS.get(ggml_type.name, ()):
        scale = rng.uniform(-1, 1, len(blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = scale.view(np.uint8).reshape(-1, 2)
    if ggml_type.name == "MXFP4":
        blocks[:, 0] = rng.integers(0, 140, len(blocks))
    return blocks.reshape(rows, -1)


SCALE_OFFSETS = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}


def random_dense(spec: ModelSpec, seed: int = 0) -> dict[str, Tensor]:
    """Return float32 tensors under canonical names for every entry of the spec's plan."""
    generator = torch.Generator().manual_seed(seed)
    shapes = REGISTRY[spec.model_type].plan(spec).required
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def config_of(spec: ModelSpec) -> dict[str, Any]:
    """Return the config.json that describes `spec`."""
    return {
        "model_type": spec.model_type,
        "architectures": list(REGISTRY[spec.model_type].architectures),
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_key_value_heads,
        "head_dim": spec.head_dim,
        "rms_norm_eps": spec.rms_norm_eps,
        "max_position_embeddings": spec.max_position_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope.theta},
        "tie_word_embeddings": spec.tie_word_embeddings,
        "attention_bias": spec.attention_bias,
        "mlp_bias": spec.mlp_bias,
    }


def write_safetensors(
    folder: Path, spec: ModelSpec, tensors: Mapping[str, Tensor], num_shards: int = 1
) -> ModelFiles:
    """Write config.json and the tensors, over several shards with an index when asked."""
    (folder / "config.json").write_text(json.dumps(config_of(spec)))
    names = list(tensors)
    if num_shards == 1:
        paths = [folder / "model.safetensors"]
        save_file(dict(tensors), paths[0])
    else:
        paths = []
        weight_map = {}
        for number in range(num_shards):
            path = folder / f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
            shard = names[number::num_shards]
            save_file({name: tensors[name] for name in shard}, path)
            weight_map.update(dict.fromkeys(shard, path.name))
            paths.append(path)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return ModelFiles(
        model_id="tiny",
        source="path",
        revision="",
        format="safetensors",
        weights=tuple(map(str, paths)),
        config=str(folder / "config.json"),
    )
