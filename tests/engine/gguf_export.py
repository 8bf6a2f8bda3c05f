"""Writes a transformers model as GGUF, with the value transforms of llama.cpp's converter.

Tensor names and keys are the gguf package's own. Quantised values are put back into the model, so
that it stays the oracle.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType

from cortexd.models import ModelFiles
from tests.engine.checkpoints import Oracle

ARCHITECTURES = {
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
    "qwen3_next": MODEL_ARCH.QWEN3NEXT,
    "qwen3_5_text": MODEL_ARCH.QWEN35,
    "qwen3_5_moe_text": MODEL_ARCH.QWEN35MOE,
}
HYBRIDS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
TILED = ("qwen3_5_text", "qwen3_5_moe_text")
# What converters keep in float32.
DENSE = ("norm", "conv1d", "A_log", "dt_bias", "bias", "mlp.gate.weight", "shared_expert_gate")


class Exporter:
    """One model and how its matrices are stored."""

    def __init__(self, model: Oracle, kind: GGMLQuantizationType) -> None:
        self.config: Any = model.config
        self.model = model
        self.family: str = model.config.model_type
        self.kind = kind
        self.names = gguf.get_tensor_name_map(
            ARCHITECTURES[self.family], model.config.num_hidden_layers
        )

    def write(self, path: Path, *, num_per_part: int = 0, has_drafts: bool = False) -> ModelFiles:
        """Write the file, or parts of `num_per_part` tensors each."""
        architecture = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[self.family]]
        writer = gguf.GGUFWriter(path, architecture, split_max_tensors=num_per_part)
        self._write_keys(writer, has_drafts)
        for name, values, kind in self._tensors():
            writer.add_tensor(name, values, raw_dtype=kind)
        if has_drafts:
            eye = np.eye(64, dtype=np.float32)
            writer.add_tensor(f"blk.{self.config.num_hidden_layers}.nextn.eh_proj.weight", eye)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        parts = sorted(path.parent.glob(f"{path.stem}*.gguf"))
        return ModelFiles(
            model_id="test/gguf",
            source="path",
            revision="local",
            format="gguf",
            weights=tuple(map(str, parts)),
        )

    def _write_keys(self, writer: gguf.GGUFWriter, has_drafts: bool) -> None:
        config = self.config
        rope = config.rope_parameters
        head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        writer.add_block_count(config.num_hidden_layers + has_drafts)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
        writer.add_token_list([f"t{index}" for index in range(config.vocab_size)])
        if getattr(config, "intermediate_size", None):
            writer.add_feed_forward_length(config.intermediate_size)
        if has_drafts:
            writer.add_nextn_predict_layers(1)
        if getattr(config, "num_experts", 0):
            writer.add_expert_count(config.num_experts)
            writer.add_expert_used_count(config.num_experts_per_tok)
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
            if self.family in HYBRIDS:
                writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
        if self.family in HYBRIDS:
            values = config.linear_num_value_heads
            writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
            writer.add_ssm_state_size(config.linear_key_head_dim)
            writer.add_ssm_group_count(config.linear_num_key_heads)
            writer.add_ssm_time_step_rank(values)
            writer.add_ssm_inner_size(values * config.linear_value_head_dim)
            writer.add_full_attention_interval(4)

    def _tensors(self) -> Iterator[tuple[str, np.ndarray, GGMLQuantizationType]]:
        """Yield file name, stored array and type of every tensor."""
        for name, parameter in self.model.named_parameters():
            if "experts.gate_up_proj" in name:
                size = self.config.moe_intermediate_size
                for part, rows in (("gate", slice(0, size)), ("up", slice(size, None))):
                    stored = name.replace("gate_up_proj", f"{part}_proj.weight")
                    yield self._stored(stored, parameter.data[:, rows])
            elif "experts.down_proj" in name:
                yield self._stored(f"{name}.weight", parameter.data)
            elif "in_proj_qkvz" in name:
                yield from self._deinterleaved(name, parameter.data)
            elif self.family in TILED and "linear_attn" in name:
                yield self._tiled(name, parameter.data)
            else:
                yield self._stored(name, parameter.data)

    def _stored(
        self, name: str, values: torch.Tensor, *, order: torch.Tensor | None = None
    ) -> tuple[str, np.ndarray, GGMLQuantizationType]:
        """Quantise `values`, put what they became back, and return what to write.

        With `order`, the columns are stored in that order.
        """
        source = values if order is None else values[..., order]
        array = np.ascontiguousarray(source.numpy())
        kind = GGMLQuantizationType.F32 if any(part in name for part in DENSE) else self.kind
        if kind is not GGMLQuantizationType.F32:
            packed = gguf.quants.quantize(array, kind)
            became = torch.from_numpy(gguf.quants.dequantize(packed, kind).copy())
            values[..., slice(None) if order is None else order] = became
            return self._file_name(name), packed, kind
        if "A_log" in name:
            array = -np.exp(array)
        elif "norm" in name and self.family in HYBRIDS and "linear_attn.norm" not in name:
            array = array + 1
        return self._file_name(name), array.squeeze(), kind

    def _tiled(
        self, name: str, values: torch.Tensor
    ) -> tuple[str, np.ndarray, GGMLQuantizationType]:
        """Return a tensor of a Gated DeltaNet layer with its V heads in tiled order."""
        config = self.config
        groups, heads = config.linear_num_key_heads, config.linear_num_value_heads
        size = config.linear_value_head_dim
        key_rows = 2 * groups * config.linear_key_head_dim
        by_head = torch.arange(heads).view(groups, -1).T.flatten()
        by_row = torch.arange(heads * size).view(groups, -1, size).transpose(0, 1).flatten()
        if "out_proj" in name:
            return self._stored(name, values, order=by_row)
        if "linear_attn.norm" in name:
            return self._stored(name, values)
        if "in_proj_qkv" in name or "conv1d" in name:
            rows = torch.cat([torch.arange(key_rows), key_rows + by_row])
        elif "in_proj_z" in name:
            rows = by_row
        else:
            rows = by_head
        moved = values[rows].clone()
        stored = self._stored(name, moved)
        values[rows] = moved  # what quantising made of it
        return stored

    def _deinterleaved(
        self, name: str, values: torch.Tensor
    ) -> Iterator[tuple[str, np.ndarray, GGMLQuantizationType]]:
        """Yield q, k, v and then z of rows that are grouped by K head."""
        config = self.config
        groups = config.linear_num_key_heads
        key_dim = config.linear_key_head_dim
        value_rows = config.linear_num_value_heads // groups * config.linear_value_head_dim
        rows = torch.arange(len(values)).view(groups, -1)
        query, key, value, gate = rows.split([key_dim, key_dim, value_rows, value_rows], dim=1)
        mixed = torch.cat([query.flatten(), key.flatten(), value.flatten()])
        for part, selected in (("in_proj_qkv", mixed), ("in_proj_z", gate.flatten())):
            moved = values[selected].clone()
            yield self._stored(name.replace("in_proj_qkvz", part), moved)
            values[selected] = moved

    def _file_name(self, name: str) -> str:
        name = name.replace(".dt_bias", ".dt_proj.bias")
        found: str | None = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, f"gguf has no name for {name}"
        return found
