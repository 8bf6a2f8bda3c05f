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
class Shape:
    """The sizes of a dense qwen3 model with a tied head."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int


QWEN3_0_6B: Final = Shape("qwen3-0.6b", 1024, 28, 16, 8, 128, 3072, 151936)


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
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "qwen3")
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

    def matrix(name: str, rows: int, columns: int) -> None:
        floats = random.standard_normal((rows, columns), dtype=np.float32) * 0.02
        halves = (floats.view(np.uint32) >> 16).astype(np.uint16)
        kind = gguf.GGMLQuantizationType.BF16
        stored = halves.view(np.uint8)
        writer.add_tensor(f"{name}.weight", stored, raw_shape=stored.shape, raw_dtype=kind)

    def norm(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    attended = shape.heads * shape.head_dim
    kv_size = shape.kv_heads * shape.head_dim
    matrix("token_embd", shape.vocab, shape.hidden)
    norm("output_norm", shape.hidden)
    for layer in range(shape.layers):
        prefix = f"blk.{layer}."
        norm(prefix + "attn_norm", shape.hidden)
        matrix(prefix + "attn_q", attended, shape.hidden)
        matrix(prefix + "attn_k", kv_size, shape.hidden)
        matrix(prefix + "attn_v", kv_size, shape.hidden)
        norm(prefix + "attn_q_norm", shape.head_dim)
        norm(prefix + "attn_k_norm", shape.head_dim)
        matrix(prefix + "attn_output", shape.hidden, attended)
        norm(prefix + "ffn_norm", shape.hidden)
        matrix(prefix + "ffn_gate", shape.intermediate, shape.hidden)
        matrix(prefix + "ffn_up", shape.intermediate, shape.hidden)
        matrix(prefix + "ffn_down", shape.hidden, shape.intermediate)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
