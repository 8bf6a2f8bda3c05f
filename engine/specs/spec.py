"""What a model's config.json says, as a checked ModelSpec; see `gguf_spec` for GGUF headers.

Pure and torch-free. Every number is range-checked where it is read, so nothing later divides by,
allocates or loops over a hostile value. What the engine does not compute is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from cortexd.errors import BadModelFile, UnsupportedArchitecture
from cortexd.models import ModelSpec
from engine.models.registry import (
    MODEL_TYPE_ALIASES,
    REGISTRY,
    Architecture,
    check_model_type,
    supported_model_types,
)
from engine.specs.fields import Fields
from engine.specs.hybrid_spec import (
    LAYER_TYPES,
    linear_attention_from_config,
    linear_layers_from_config,
    moe_from_config,
)
from engine.specs.rope_spec import check_rotary_dim, rope_from_config

MAX_VOCAB: int = 1 << 24
MAX_WIDTH: int = 1 << 20  # hidden and intermediate sizes
MAX_LAYERS: int = 1024
MAX_HEADS: int = 4096
MAX_HEAD_DIM: int = 1024
MAX_POSITIONS: int = 1 << 30
# Fields that a multimodal configuration may give at its top for the language model.
_SHARED_WITH_TEXT: Final = (
    "dtype",
    "torch_dtype",
    "eos_token_id",
    "bos_token_id",
    "quantization_config",
)


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
    model_type, architecture = _model_type(Fields(config, file))
    entry = REGISTRY[model_type]
    fields = _text_fields(config, file, entry)
    _refuse_unsupported_options(fields, model_type)
    num_layers = fields.integer("num_hidden_layers", maximum=MAX_LAYERS)
    moe = (
        moe_from_config(
            fields,
            num_layers,
            normalizes=entry.normalizes_experts,
            has_shared_expert=entry.has_shared_expert,
        )
        if entry.has_experts
        else None
    )
    hidden_size = fields.integer("hidden_size", maximum=MAX_WIDTH)
    num_heads = fields.integer("num_attention_heads", maximum=MAX_HEADS)
    num_kv_heads = fields.integer("num_key_value_heads", maximum=MAX_HEADS, default=num_heads)
    head_dim = _head_dim(fields, "head_dim", entry, hidden_size, num_heads)
    check_heads(file, num_heads, num_kv_heads, "num_attention_heads", "num_key_value_heads")
    max_positions = fields.integer(
        "max_position_embeddings",
        maximum=MAX_POSITIONS,
        default=entry.default_max_position_embeddings,
    )
    rope = rope_from_config(
        fields, max_positions, default_partial=entry.default_partial_rotary_factor
    )
    check_rotary_dim(file, head_dim, rope)
    vocab_size = fields.integer("vocab_size", maximum=MAX_VOCAB)
    eos = fields.token_ids("eos_token_id", vocab_size)
    if "eos_token_id" not in fields.values:
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
        intermediate_size=fields.integer(
            "intermediate_size",
            maximum=MAX_WIDTH,
            # Where every layer has experts, nothing else is that wide.
            default=moe.intermediate_size if moe is not None and not moe.dense_layers else None,
        ),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", minimum=0.0, maximum=1.0, default=1e-6),
        max_position_embeddings=max_positions,
        rope=rope,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
        attention_bias=(not entry.has_qkv_bias and fields.boolean("attention_bias", default=False)),
        qkv_bias=entry.has_qkv_bias,
        mlp_bias=entry.may_have_mlp_bias and fields.boolean("mlp_bias", default=False),
        torch_dtype=_torch_dtype(fields),
        eos_token_ids=tuple(dict.fromkeys(eos)),
        bos_token_id=bos[0] if bos else None,
        linear_layers=linear_layers_from_config(fields, num_layers) if entry.is_hybrid else (),
        linear_attention=linear_attention_from_config(fields) if entry.is_hybrid else None,
        moe=moe,
    )


def _text_fields(config: Mapping[str, Any], file: str, entry: Architecture) -> Fields:
    """Return where the language model's fields are: the top, or text_config of a multimodal one.

    What both may say is taken from text_config, except whether the head is tied, which is a
    property of the whole model.
    """
    text = Fields(config, file).mapping("text_config") if entry.has_text_config else {}
    if not text:
        return Fields(config, file)
    named = text.get("model_type")
    if named is not None and named not in entry.aliases:
        raise BadModelFile(
            f"{file}: text_config.model_type is {Fields.shown(named)}; it must be one of: "
            f"{', '.join(entry.aliases)}"
        )
    shared = {key: config[key] for key in _SHARED_WITH_TEXT if config.get(key) is not None}
    merged = {**shared, **{key: value for key, value in text.items() if value is not None}}
    if config.get("tie_word_embeddings") is not None:
        merged["tie_word_embeddings"] = config["tie_word_embeddings"]
    return Fields(merged, f"{file} text_config")


def _model_type(fields: Fields) -> tuple[str, str]:
    """Return (model_type, architecture), both known to the registry."""
    value = fields.values.get("model_type")
    value = MODEL_TYPE_ALIASES.get(value, value) if isinstance(value, str) else value
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
    if not fields.boolean("attn_output_gate", default=True):
        raise _unsupported(fields, "attn_output_gate", model_type, "true")
    layer_types = fields.strings("layer_types")
    allowed = LAYER_TYPES if REGISTRY[model_type].is_hybrid else LAYER_TYPES[:1]
    if set(layer_types) - set(allowed):
        raise _unsupported(fields, "layer_types", model_type, f"only {', '.join(allowed)}")
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


def check_heads(file: str, num_heads: int, num_kv_heads: int, heads: str, kv_heads: str) -> None:
    """Check that query heads share KV heads evenly; `heads` and `kv_heads` name the fields."""
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
