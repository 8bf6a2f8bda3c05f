"""What a model's own description (config.json, or a GGUF header) says, as a checked ModelSpec.

Pure and torch-free. Every number is range-checked where it is read, so nothing later divides by,
allocates or loops over a hostile value. What the engine does not compute is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cortexd.errors import BadModelFile, UnsupportedArchitecture
from cortexd.models import ModelSpec
from engine.fields import Fields
from engine.formats.gguf import GGUFFile
from engine.models.registry import (
    REGISTRY,
    Architecture,
    check_model_type,
    model_type_of_gguf,
    supported_model_types,
)
from engine.rope_spec import check_rotary_dim, rope_from_config, rope_from_gguf

MAX_VOCAB: int = 1 << 24
MAX_WIDTH: int = 1 << 20  # hidden and intermediate sizes
MAX_LAYERS: int = 1024
MAX_HEADS: int = 4096
MAX_HEAD_DIM: int = 1024
MAX_POSITIONS: int = 1 << 30


def spec_from_config(
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None = None,
    *,
    file: str = "config.json",
    generation_file: str = "generation_config.json",
) -> ModelSpec:
    """Return the spec of a Hugging Face configuration.

    `eos_token_ids` is the union of what both files say. Raises: UnsupportedArchitecture,
    BadModelFile; both name `file` and the field.
    """
    fields = Fields(config, file)
    model_type, architecture = _model_type(fields)
    entry = REGISTRY[model_type]
    _refuse_unsupported_options(fields, model_type)
    hidden_size = fields.integer("hidden_size", maximum=MAX_WIDTH)
    num_heads = fields.integer("num_attention_heads", maximum=MAX_HEADS)
    num_kv_heads = fields.integer("num_key_value_heads", maximum=MAX_HEADS, default=num_heads)
    head_dim = _head_dim(fields, "head_dim", entry, hidden_size, num_heads)
    _check_heads(file, num_heads, num_kv_heads, "num_attention_heads", "num_key_value_heads")
    max_positions = fields.integer(
        "max_position_embeddings",
        maximum=MAX_POSITIONS,
        default=entry.default_max_position_embeddings,
    )
    rope = rope_from_config(fields, max_positions)
    check_rotary_dim(file, head_dim, rope)
    vocab_size = fields.integer("vocab_size", maximum=MAX_VOCAB)
    eos = fields.token_ids("eos_token_id", vocab_size)
    if "eos_token_id" not in config:
        eos = [i for i in entry.default_eos_token_ids if i < vocab_size]
    if generation_config is not None:
        generation = Fields(generation_config, generation_file)
        eos += generation.token_ids("eos_token_id", vocab_size)
    bos = fields.token_ids("bos_token_id", vocab_size)
    return ModelSpec(
        model_type=model_type,
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", maximum=MAX_WIDTH),
        num_hidden_layers=fields.integer("num_hidden_layers", maximum=MAX_LAYERS),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", minimum=0.0, maximum=1.0, default=1e-6),
        max_position_embeddings=max_positions,
        rope=rope,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
        attention_bias=fields.boolean("attention_bias", default=False),
        mlp_bias=fields.boolean("mlp_bias", default=False),
        torch_dtype=_torch_dtype(fields),
        eos_token_ids=tuple(dict.fromkeys(eos)),
        bos_token_id=bos[0] if bos else None,
    )


def _model_type(fields: Fields) -> tuple[str, str]:
    """Return (model_type, architecture), both known to the registry."""
    value = fields.values.get("model_type")
    if not isinstance(value, str) or not value:
        found = "is missing" if value is None else f"is {fields.shown(value)}, not a name"
        raise BadModelFile(
            f"{fields.file}: model_type {found}; it must name one of: "
            f"{', '.join(supported_model_types())}"
        )
    architectures = fields.strings("architectures")
    entry = check_model_type(value, architectures, fields.file)
    known = [name for name in architectures if name in entry.architectures]
    return value, (known or list(entry.architectures))[0]


def _refuse_unsupported_options(fields: Fields, model_type: str) -> None:
    """Refuse what would silently compute something else."""
    activation = fields.values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise _unsupported(fields, "hidden_act", model_type, '"silu"')
    if fields.boolean("use_sliding_window", default=False):
        raise _unsupported(fields, "use_sliding_window", model_type, "false (full attention only)")
    layer_types = fields.strings("layer_types")
    if set(layer_types) - {"full_attention"}:
        raise _unsupported(fields, "layer_types", model_type, 'only "full_attention"')
    num_layers = fields.values.get("num_hidden_layers")
    if layer_types and len(layer_types) != num_layers:
        raise BadModelFile(
            f"{fields.file}: layer_types has {len(layer_types)} entries for num_hidden_layers = "
            f"{fields.shown(num_layers)}"
        )
    if fields.values.get("quantization_config") is not None:
        raise _unsupported(
            fields, "quantization_config", model_type, "unquantised safetensors, or GGUF"
        )


def _unsupported(
    fields: Fields, key: str, model_type: str, allowed: str
) -> UnsupportedArchitecture:
    value = fields.shown(fields.values.get(key))
    return UnsupportedArchitecture(
        f"{fields.file}: {key} = {value} is not supported for {model_type}; supported: {allowed}",
        model_type=model_type,
        supported=supported_model_types(),
    )


def _head_dim(
    fields: Fields, key: str, entry: Architecture, hidden_size: int, num_heads: int
) -> int:
    default = entry.default_head_dim
    if default is None and fields.values.get(key) is None:
        if hidden_size % num_heads:
            raise BadModelFile(
                f"{fields.file}: {key} is not given and hidden size {hidden_size} is not a "
                f"multiple of the {num_heads} attention heads"
            )
        default = hidden_size // num_heads
    head_dim = fields.integer(key, maximum=MAX_HEAD_DIM, default=default)
    if head_dim % 2:
        raise BadModelFile(
            f"{fields.file}: {key} = {head_dim} is odd; rotary embedding needs pairs"
        )
    return head_dim


def _check_heads(file: str, num_heads: int, num_kv_heads: int, heads: str, kv_heads: str) -> None:
    if num_heads % num_kv_heads:
        raise BadModelFile(
            f"{file}: {heads} = {num_heads} is not a multiple of {kv_heads} = {num_kv_heads}"
        )


def _torch_dtype(fields: Fields) -> str:
    value = fields.values.get("dtype") or fields.values.get("torch_dtype") or "bfloat16"
    if value not in ("float32", "float16", "bfloat16"):
        raise BadModelFile(
            f"{fields.file}: dtype {fields.shown(value)}; supported: float32, float16, bfloat16"
        )
    return str(value)


def spec_from_gguf(gguf: GGUFFile) -> ModelSpec:
    """Return the spec that a GGUF header describes.

    `tie_word_embeddings` and the bias flags follow from which tensors are there. Raises:
    UnsupportedArchitecture, BadModelFile; both name the file and the key.
    """
    model_type = model_type_of_gguf(gguf.architecture, gguf.path)
    entry = REGISTRY[model_type]
    prefix = f"{gguf.architecture}."
    metadata = gguf.metadata
    fields = Fields(metadata, gguf.path)
    hidden_size = fields.integer(f"{prefix}embedding_length", maximum=MAX_WIDTH)
    heads_key, kv_key = f"{prefix}attention.head_count", f"{prefix}attention.head_count_kv"
    num_heads = fields.uniform_integer(heads_key, maximum=MAX_HEADS)
    num_kv_heads = fields.uniform_integer(kv_key, maximum=MAX_HEADS, default=num_heads)
    _check_heads(gguf.path, num_heads, num_kv_heads, heads_key, kv_key)
    head_dim = _gguf_head_dim(fields, prefix, hidden_size, num_heads)
    rope = rope_from_gguf(fields, prefix, head_dim, default_theta=entry.gguf_rope_theta)
    check_rotary_dim(gguf.path, head_dim, rope)
    if entry.has_permuted_rope_rows and rope.partial_rotary_factor != 1.0:
        raise UnsupportedArchitecture(
            f"{gguf.path}: {prefix}rope.dimension_count must be the head size {head_dim}; partly "
            f"rotated heads are not supported for {model_type}"
        )
    vocab_size = _gguf_vocab_size(gguf)
    return ModelSpec(
        model_type=model_type,
        architecture=gguf.architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.uniform_integer(f"{prefix}feed_forward_length", maximum=MAX_WIDTH),
        num_hidden_layers=fields.integer(f"{prefix}block_count", maximum=MAX_LAYERS),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number(
            f"{prefix}attention.layer_norm_rms_epsilon", minimum=0.0, maximum=1.0
        ),
        max_position_embeddings=fields.integer(f"{prefix}context_length", maximum=MAX_POSITIONS),
        rope=rope,
        tie_word_embeddings="output.weight" not in gguf.tensors,
        attention_bias="blk.0.attn_q.bias" in gguf.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in gguf.tensors,
        torch_dtype=_gguf_dtype(gguf),
        eos_token_ids=_gguf_eos(fields, vocab_size),
        bos_token_id=next(iter(fields.token_ids("tokenizer.ggml.bos_token_id", vocab_size)), None),
    )


def _gguf_head_dim(fields: Fields, prefix: str, hidden_size: int, num_heads: int) -> int:
    key = f"{prefix}attention.key_length"
    if fields.values.get(key) is None and hidden_size % num_heads:
        raise BadModelFile(
            f"{fields.file}: {key} is not given and {prefix}embedding_length {hidden_size} is not "
            f"a multiple of the {num_heads} attention heads"
        )
    head_dim = fields.integer(key, maximum=MAX_HEAD_DIM, default=hidden_size // num_heads)
    value_key = f"{prefix}attention.value_length"
    value_dim = fields.integer(value_key, maximum=MAX_HEAD_DIM, default=head_dim)
    if value_dim != head_dim or head_dim % 2:
        raise BadModelFile(
            f"{fields.file}: {key} = {head_dim} and {value_key} = {value_dim}; they must be equal "
            "and even"
        )
    return head_dim


def _gguf_vocab_size(gguf: GGUFFile) -> int:
    """Return the rows of the embedding, which must agree with the token list."""
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise BadModelFile(f"{gguf.path}: tensor token_embd.weight is missing or not a matrix")
    rows = embedding.shape[0]
    num_tokens = gguf.metadata.array_length("tokenizer.ggml.tokens")
    if rows > MAX_VOCAB or (num_tokens is not None and num_tokens > rows):
        raise BadModelFile(
            f"{gguf.path}: token_embd.weight has {rows} rows; tokenizer.ggml.tokens has "
            f"{num_tokens} entries; at most {MAX_VOCAB} rows are accepted"
        )
    return rows


def _gguf_dtype(gguf: GGUFFile) -> str:
    """Return the number type the weights were made from, as far as the file tells."""
    by_type = {"F32": "float32", "F16": "float16"}
    return by_type.get(gguf.tensors["token_embd.weight"].ggml_type.name, "bfloat16")


def _gguf_eos(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    names = ("eos", "eot", "eom")
    ids = [i for n in names for i in fields.token_ids(f"tokenizer.ggml.{n}_token_id", vocab_size)]
    return tuple(dict.fromkeys(ids))
