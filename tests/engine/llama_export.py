"""Writes a transformers llama as GGUF: rope rows interleaved, matrices of any type.

What a type makes of the matrices is put back into the model, so that it stays the oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from cortexd.models import ModelFiles
from tests.engine.checkpoints import VOCAB_SIZE, Oracle

Pack = Callable[[np.ndarray, Type], np.ndarray]

HIDDEN_SIZE = 96  # three blocks of 32
NUM_HEADS, NUM_KV_HEADS = 6, 2
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    """Return the GGUF name of a transformers parameter."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, _, layer, *rest, suffix = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(rest)]}.{suffix}"


def to_interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder a q or k projection's rows as llama GGUF files hold them."""
    halves = weight.reshape(num_heads, 2, -1, weight.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def write_gguf(
    model: Oracle,
    path: Path,
    kind: Type,
    factors: Tensor | None = None,
    pack: Pack = gguf.quants.quantize,
) -> ModelFiles:
    """Write the matrices as `kind`, made by `pack`, and put what they became into the model."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // NUM_HEADS)
    writer.add_vocab_size(VOCAB_SIZE)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{index}" for index in range(VOCAB_SIZE)])
    writer.add_eos_token_id(VOCAB_SIZE - 1)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2
        stored = parameter.detach().numpy()
        if is_matrix:
            stored = pack(stored, kind)
            parameter.data = torch.from_numpy(gguf.quants.dequantize(stored, kind).copy())
        if "q_proj" in name or "k_proj" in name:
            stored = to_interleaved(stored, NUM_HEADS if "q_proj" in name else NUM_KV_HEADS)
        writer.add_tensor(gguf_name(name), stored, raw_dtype=kind if is_matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelFiles(
        model_id="test/gguf",
        source="path",
        revision="local",
        format="gguf",
        weights=(str(path),),
    )
