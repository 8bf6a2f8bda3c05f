"""Who holds which part of a tensor, and which world sizes a model allows."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortexd.errors import InvalidValue, UnsupportedArchitecture
from cortexd.models import LinearAttentionSpec, ModelSpec, MoeSpec, RopeSpec
from engine.models.registry import REGISTRY
from engine.tp.linear_heads import LinearHeads
from engine.tp.sharding import (
    SHARDED_MODEL_TYPES,
    Rule,
    Shard,
    allowed_world_sizes,
    check_world_size,
    rule_of,
)

SPEC = ModelSpec(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    vocab_size=97,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=16,
    rms_norm_eps=1e-6,
    max_position_embeddings=64,
    rope=RopeSpec(),
)
LINEAR = LinearAttentionSpec(
    num_key_heads=4, num_value_heads=12, key_head_dim=2, value_head_dim=3, conv_kernel=4
)
HYBRID = msgspec.structs.replace(
    SPEC, model_type="qwen3_5", linear_layers=(0,), linear_attention=LINEAR
)
FUSED_HYBRID = msgspec.structs.replace(
    HYBRID,
    model_type="qwen3_next",
    linear_attention=msgspec.structs.replace(LINEAR, projections="fused"),
)
EXPERTS = MoeSpec(
    num_experts=4, num_experts_per_tok=2, intermediate_size=36, shared_intermediate_size=24
)
MOE = msgspec.structs.replace(SPEC, model_type="qwen3_moe", moe=EXPERTS)
STACKED_MOE = msgspec.structs.replace(
    MOE, moe=msgspec.structs.replace(EXPERTS, expert_tensors="stacked_gate_up")
)


def _spec(**fields: Any) -> ModelSpec:
    return msgspec.structs.replace(SPEC, **fields)


def test_every_planned_tensor_of_a_split_model_has_a_rule() -> None:
    """A new tensor in a plan cannot be forgotten here."""
    assert set(REGISTRY) == SHARDED_MODEL_TYPES
    for known in (SPEC, HYBRID, FUSED_HYBRID, MOE, STACKED_MOE):
        spec = msgspec.structs.replace(known, attention_bias=True, mlp_bias=True)
        for name in REGISTRY[spec.model_type].plan(spec).required:
            assert isinstance(rule_of(name), Rule)


@given(vocab_size=st.integers(1, 400), world_size=st.integers(1, 8))
def test_vocabulary_is_dealt_out_whole_and_in_order(vocab_size: int, world_size: int) -> None:
    """Parts join without gap or overlap; all but the last have one size."""
    spec = _spec(vocab_size=vocab_size, num_attention_heads=840, num_key_value_heads=840)
    spec = msgspec.structs.replace(spec, intermediate_size=840)
    if world_size not in allowed_world_sizes(spec):
        return
    parts = [Shard(rank, world_size).vocabulary(vocab_size) for rank in range(world_size)]
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert (parts[0].start, parts[-1].stop) == (0, vocab_size)
    sizes = [part.stop - part.start for part in parts]
    assert min(sizes) > 0
    assert set(sizes[:-1]) <= {Shard(0, world_size).vocabulary_part(vocab_size)}


def test_more_ranks_than_kv_heads_share_them() -> None:
    """Each rank gets the head that its query heads read."""
    heads = [Shard(rank, 6).kv_heads(3) for rank in range(6)]
    assert [head.start for head in heads] == [0, 0, 1, 1, 2, 2]
    local = Shard(3, 6).local_spec(SPEC)
    assert (local.num_attention_heads, local.num_key_value_heads) == (1, 1)


@pytest.mark.parametrize(
    ("fields", "world_size", "text"),
    [
        ({"num_attention_heads": 9}, 2, "num_attention_heads = 9"),
        ({"intermediate_size": 100}, 3, "intermediate_size = 100"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4}, 3, "num_attention_heads = 8"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3}, 2, "num_key_value_heads = 3"),
        ({"vocab_size": 4}, 3, "vocab_size = 4"),
        ({"linear_attention": LINEAR}, 3, "linear_num_key_heads = 4"),
        (
            {"linear_attention": msgspec.structs.replace(LINEAR, num_key_heads=3)},
            8,
            "linear_num_value_heads = 12",
        ),
        ({"moe": msgspec.structs.replace(EXPERTS, intermediate_size=40)}, 3, "moe_intermediate"),
        (
            {"moe": msgspec.structs.replace(EXPERTS, shared_intermediate_size=8)},
            3,
            "shared_expert_intermediate_size = 8",
        ),
    ],
)
def test_world_size_that_does_not_divide_names_the_quantity(
    fields: dict[str, Any], world_size: int, text: str
) -> None:
    """And what is allowed instead."""
    divisible = {"num_attention_heads": 24, "num_key_value_heads": 24}
    fields = fields if "num_attention_heads" in fields else {**divisible, **fields}
    with pytest.raises(InvalidValue, match=text) as caught:
        check_world_size(_spec(**fields), world_size)
    assert "allowed for this model: 1" in caught.value.message


def test_known_models_allow_what_the_reference_says() -> None:
    """SmolLM2-135M cannot be halved."""
    smol = _spec(
        num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536, vocab_size=49152
    )
    assert allowed_world_sizes(smol) == [1, 3]
    qwen = _spec(
        num_attention_heads=16, num_key_value_heads=8, intermediate_size=3072, vocab_size=151936
    )
    assert allowed_world_sizes(qwen) == [1, 2, 4, 8, 16]


def test_model_type_without_rules_is_refused() -> None:
    """By name, with the supported ones."""
    with pytest.raises(UnsupportedArchitecture, match="llama, qwen2, qwen3"):
        check_world_size(_spec(model_type="mamba"), 2)


def test_width_of_a_plain_layer_plays_no_part_where_all_layers_have_experts() -> None:
    """Configurations of mixtures of experts carry one that no layer has."""
    assert 2 in allowed_world_sizes(_spec(num_key_value_heads=2, intermediate_size=37, moe=EXPERTS))
    mixed = msgspec.structs.replace(EXPERTS, dense_layers=(1,))
    assert 2 not in allowed_world_sizes(
        _spec(num_key_value_heads=2, intermediate_size=37, moe=mixed)
    )


@pytest.mark.parametrize("has_tiled_heads", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4, 12])
def test_linear_heads_are_dealt_out_whole_each_value_head_beside_its_key_head(
    world_size: int, has_tiled_heads: bool
) -> None:
    """Every V head once; the local reading of K heads is the whole model's."""
    spec = msgspec.structs.replace(LINEAR, has_tiled_heads=has_tiled_heads)
    dealt: list[int] = []
    for rank in range(world_size):
        heads = LinearHeads.of(spec, rank, world_size)
        keys = list(range(LINEAR.num_key_heads))[heads.keys]
        values = [head for part in heads.values for head in range(part.start, part.stop)]
        local = heads.local_spec
        assert (local.num_key_heads, local.num_value_heads) == (len(keys), len(values))
        for index, value in enumerate(values):
            assert _key_head(spec, value) == keys[_key_head(local, index)]
        dealt += values
    assert sorted(dealt) == list(range(LINEAR.num_value_heads))


def _key_head(spec: LinearAttentionSpec, value_head: int) -> int:
    if spec.has_tiled_heads:
        return value_head % spec.num_key_heads
    return value_head // (spec.num_value_heads // spec.num_key_heads)


@pytest.mark.parametrize("world_size", [2, 4, 12])
def test_fused_projections_are_cut_into_the_same_heads_as_separate_ones(world_size: int) -> None:
    """Rows stored K head by K head: q, k, v, z and b, a of exactly this rank's heads."""
    key, value, per_key = LINEAR.key_head_dim, LINEAR.value_head_dim, 3
    qkvz, ba = [], []
    for head in range(LINEAR.num_key_heads):
        qkvz += [f"q{head}"] * key + [f"k{head}"] * key
        values = range(head * per_key, (head + 1) * per_key)
        qkvz += [f"v{v}" for v in values for _ in range(value)]
        qkvz += [f"z{v}" for v in values for _ in range(value)]
        ba += [f"b{v}" for v in values] + [f"a{v}" for v in values]
    for rank in range(world_size):
        heads = LinearHeads.of(LINEAR, rank, world_size)
        keys = {str(head) for head in range(LINEAR.num_key_heads)[heads.keys]}
        values = {str(v) for part in heads.values for v in range(part.start, part.stop)}
        for stored, ranges in (
            (qkvz, heads.groups([key, key], [value, value])),
            (ba, heads.groups([], [1, 1])),
        ):
            wanted = [row for row in stored if row[1:] in (keys if row[0] in "qk" else values)]
            assert [row for part in ranges for row in stored[part]] == wanted
