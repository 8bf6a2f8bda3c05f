"""What a configuration or GGUF header says of linear-attention layers and of experts. Pure.

Called by the spec readers for the architectures that have such layers. Every number is checked
here, and so is that the numbers fit each other.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Final

from cortexd.errors import BadModelFile
from cortexd.models import LinearAttentionSpec, MoeSpec
from engine.specs.fields import Fields

MAX_LINEAR_HEADS: Final = 4096
MAX_LINEAR_HEAD_DIM: Final = 1024
MAX_CONV_KERNEL: Final = 16
MAX_EXPERTS: Final = 4096
# The plan names every expert of every layer; the largest models known have 25,000.
MAX_EXPERTS_OF_ALL_LAYERS: Final = 200_000
MAX_WIDTH: Final = 1 << 20
LAYER_TYPES: Final = ("full_attention", "linear_attention")
_DEFAULT_INTERVAL: Final = 4


def linear_layers_from_config(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """Return which layers have linear attention; the list of types wins over the interval."""
    layer_types = fields.strings("layer_types")
    if not layer_types:
        return _linear_layers_of_interval(fields, "full_attention_interval", num_layers)
    linear = tuple(i for i, kind in enumerate(layer_types) if kind == "linear_attention")
    return _check_linear_layers(fields, "layer_types", linear, num_layers)


def linear_layers_from_gguf(fields: Fields, prefix: str, num_layers: int) -> tuple[int, ...]:
    """Return which layers have linear attention, as GGUF headers say it."""
    return _linear_layers_of_interval(fields, f"{prefix}full_attention_interval", num_layers)


def linear_attention_from_config(fields: Fields) -> LinearAttentionSpec:
    """Return the Gated DeltaNet dimensions of a Hugging Face configuration."""
    heads, sizes = MAX_LINEAR_HEADS, MAX_LINEAR_HEAD_DIM
    linear = LinearAttentionSpec(
        num_key_heads=fields.integer("linear_num_key_heads", maximum=heads),
        num_value_heads=fields.integer("linear_num_value_heads", maximum=heads),
        key_head_dim=fields.integer("linear_key_head_dim", maximum=sizes),
        value_head_dim=fields.integer("linear_value_head_dim", maximum=sizes),
        conv_kernel=fields.integer(
            "linear_conv_kernel_dim", minimum=2, maximum=MAX_CONV_KERNEL, default=4
        ),
    )
    return _check_groups(fields.file, "linear_num_value_heads", "linear_num_key_heads", linear)


def linear_attention_from_gguf(
    fields: Fields, prefix: str, *, has_tiled_heads: bool
) -> LinearAttentionSpec:
    """Return the Gated DeltaNet dimensions of a GGUF header."""
    value_heads_key, inner_key = f"{prefix}ssm.time_step_rank", f"{prefix}ssm.inner_size"
    value_heads = fields.integer(value_heads_key, maximum=MAX_LINEAR_HEADS)
    inner = fields.integer(inner_key, maximum=MAX_LINEAR_HEADS * MAX_LINEAR_HEAD_DIM)
    if inner % value_heads or inner // value_heads > MAX_LINEAR_HEAD_DIM:
        raise BadModelFile(
            f"{fields.file}: {inner_key} = {inner} is not {value_heads_key} = {value_heads} heads "
            f"of at most {MAX_LINEAR_HEAD_DIM}"
        )
    linear = LinearAttentionSpec(
        num_key_heads=fields.integer(f"{prefix}ssm.group_count", maximum=MAX_LINEAR_HEADS),
        num_value_heads=value_heads,
        key_head_dim=fields.integer(f"{prefix}ssm.state_size", maximum=MAX_LINEAR_HEAD_DIM),
        value_head_dim=inner // value_heads,
        conv_kernel=fields.integer(
            f"{prefix}ssm.conv_kernel", minimum=2, maximum=MAX_CONV_KERNEL, default=4
        ),
        has_tiled_heads=has_tiled_heads,
    )
    return _check_groups(fields.file, value_heads_key, f"{prefix}ssm.group_count", linear)


def moe_from_config(
    fields: Fields, num_layers: int, *, normalizes: bool | None, has_shared_expert: bool
) -> MoeSpec:
    """Return the experts of a Hugging Face configuration.

    `normalizes`: what norm_topk_prob is when not given; None when the family always normalises.
    """
    count_key = "num_experts" if fields.values.get("num_experts") is not None else None
    count_key = count_key or "num_local_experts"
    num_experts = fields.integer(count_key, maximum=MAX_EXPERTS)
    _check_num_experts(fields, count_key, num_experts, num_layers)
    step = fields.integer("decoder_sparse_step", maximum=num_layers, default=1)
    plain = fields.integers("mlp_only_layers", num_layers)
    return MoeSpec(
        num_experts=num_experts,
        num_experts_per_tok=fields.integer("num_experts_per_tok", maximum=num_experts),
        intermediate_size=fields.integer("moe_intermediate_size", maximum=MAX_WIDTH),
        shared_intermediate_size=(
            fields.integer("shared_expert_intermediate_size", maximum=MAX_WIDTH)
            if has_shared_expert
            else 0
        ),
        norm_topk_prob=(
            True if normalizes is None else fields.boolean("norm_topk_prob", default=normalizes)
        ),
        dense_layers=tuple(i for i in range(num_layers) if i in plain or (i + 1) % step),
    )


def moe_from_gguf(fields: Fields, prefix: str, names: Container[str], num_layers: int) -> MoeSpec:
    """Return the experts of a GGUF header; `names` are the file's tensors."""
    count_key = f"{prefix}expert_count"
    num_experts = fields.integer(count_key, maximum=MAX_EXPERTS)
    _check_num_experts(fields, count_key, num_experts, num_layers)
    shared_key = f"{prefix}expert_shared_feed_forward_length"
    return MoeSpec(
        num_experts=num_experts,
        num_experts_per_tok=fields.integer(f"{prefix}expert_used_count", maximum=num_experts),
        intermediate_size=fields.integer(f"{prefix}expert_feed_forward_length", maximum=MAX_WIDTH),
        shared_intermediate_size=(
            fields.integer(shared_key, maximum=MAX_WIDTH)
            if "blk.0.ffn_gate_shexp.weight" in names
            else 0
        ),
        norm_topk_prob=fields.boolean(f"{prefix}expert_weights_norm", default=True),
        expert_tensors="stacked",
    )


def _linear_layers_of_interval(fields: Fields, key: str, num_layers: int) -> tuple[int, ...]:
    interval = fields.integer(key, maximum=1 << 16, default=_DEFAULT_INTERVAL)
    linear = tuple(i for i in range(num_layers) if (i + 1) % interval)
    return _check_linear_layers(fields, key, linear, num_layers)


def _check_linear_layers(
    fields: Fields, key: str, linear: tuple[int, ...], num_layers: int
) -> tuple[int, ...]:
    if len(linear) == num_layers:
        raise BadModelFile(
            f"{fields.file}: {key} gives none of the {num_layers} layers full attention; at least "
            "one is needed"
        )
    return linear


def _check_groups(
    file: str, value_key: str, key_key: str, linear: LinearAttentionSpec
) -> LinearAttentionSpec:
    if linear.num_value_heads % linear.num_key_heads:
        raise BadModelFile(
            f"{file}: {value_key} = {linear.num_value_heads} is not a multiple of {key_key} = "
            f"{linear.num_key_heads}"
        )
    return linear


def _check_num_experts(fields: Fields, key: str, num_experts: int, num_layers: int) -> None:
    if num_experts * num_layers > MAX_EXPERTS_OF_ALL_LAYERS:
        raise BadModelFile(
            f"{fields.file}: {key} = {num_experts} in {num_layers} layers is absurd; at most "
            f"{MAX_EXPERTS_OF_ALL_LAYERS} experts in all are accepted"
        )
