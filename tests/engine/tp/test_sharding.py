"""Who holds which part of a tensor, and which world sizes a model allows."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cortexd.errors import InvalidValue, UnsupportedArchitecture
from cortexd.models import ModelSpec, RopeSpec
from engine.formats.checkpoint import Checkpoint
from engine.loader import Weights
from engine.models.registry import REGISTRY, load_class
from engine.tp.comm import Comm
from engine.tp.sharding import (
    SHARDED_MODEL_TYPES,
    Rule,
    Shard,
    allowed_world_sizes,
    check_world_size,
    rule_of,
)
from tests.engine.model_files import random_dense, write_safetensors

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


def _spec(**fields: int | str) -> ModelSpec:
    return msgspec.structs.replace(SPEC, **fields)


def test_every_planned_tensor_of_a_split_model_has_a_rule() -> None:
    """A new tensor in a plan cannot be forgotten here."""
    for model_type in SHARDED_MODEL_TYPES & REGISTRY.keys():
        spec = msgspec.structs.replace(
            SPEC, model_type=model_type, attention_bias=True, mlp_bias=True
        )
        for name in REGISTRY[model_type].plan(spec).required:
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
    ],
)
def test_world_size_that_does_not_divide_names_the_quantity(
    fields: dict[str, int], world_size: int, text: str
) -> None:
    """And what is allowed instead."""
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
        check_world_size(_spec(model_type="qwen3_5"), 2)


@pytest.mark.parametrize("world_size", [1, 3, 6])
def test_rank_reads_exactly_its_part_of_every_tensor(world_size: int, tmp_path: Path) -> None:
    """Bytes read over all ranks: split tensors once, replicated ones and shared heads on each."""
    files = write_safetensors(tmp_path, SPEC, random_dense(SPEC))
    planned = REGISTRY["qwen3"].plan(SPEC).required
    copies = {Rule.REPLICATED: world_size, Rule.KV_ROWS: max(1, world_size // 3)}
    expected = sum(
        4 * int(torch.tensor(shape).prod()) * copies.get(rule_of(name), 1)
        for name, shape in planned.items()
    )
    total = 0
    for rank in range(world_size):
        comm = Comm()
        comm.shard = Shard(rank, world_size)  # nothing is computed, so no group is needed
        weights = Weights(Checkpoint.open(files), SPEC, comm=comm, backend="reference")
        load_class("qwen3")(comm.shard.local_spec(SPEC), weights)
        weights.check_all_used()
        assert weights.memory_bytes == weights.total_bytes
        total += weights.total_bytes
        weights.close()
    assert total == expected
