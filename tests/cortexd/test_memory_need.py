"""What a model needs on a device, and what would need less."""

from __future__ import annotations

from typing import Any

import msgspec

from cortexd.memory_need import (
    MIB,
    SCRATCH_BYTES,
    describe,
    memory_need,
    missing_bytes,
    what_fits,
)
from cortexd.models import LinearAttentionSpec, ModelSpec, RopeSpec, WeightBytes
from cortexd.settings import Engine

GIB = 2**30
# 2 * 16 layers * 8 KV heads * 128 * 2 bytes = 64 KiB per token in 16 bits.
SPEC = ModelSpec(
    model_type="llama",
    architecture="LlamaForCausalLM",
    vocab_size=1000,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    max_position_embeddings=32768,
    rope=RopeSpec(),
)
WEIGHTS = WeightBytes(4 * GIB, 4 * GIB, 8 * GIB, {"q8_0": 2 * GIB, "q4_0": GIB})


def need_of(kind: str = "cuda", world_size: int = 1, **fields: Any) -> tuple[int, int]:
    """Return the bytes of weights and cache."""
    need = memory_need(SPEC, WEIGHTS, Engine(**fields), kind=kind, world_size=world_size)
    assert need.total == need.weights + need.cache + SCRATCH_BYTES[kind]
    return need.weights, need.cache


def test_weights_count_as_the_device_holds_them() -> None:
    """16 bits on CUDA unless float32 is wanted; as stored with the CPU's kernels."""
    assert need_of()[0] == 4 * GIB
    assert need_of(dtype="float32")[0] == 8 * GIB
    assert need_of("cpu")[0] == 4 * GIB
    assert need_of("cpu", dtype="float32", backend="reference")[0] == 8 * GIB
    assert need_of(world_size=2)[0] == 2 * GIB


def test_cache_is_for_one_useful_sequence() -> None:
    """4096 tokens and a null block; less where less is asked for; a share of the KV heads."""
    block = 32 * 65536
    assert need_of()[1] == 129 * block
    assert need_of(world_size=2)[1] == 129 * block // 2
    assert need_of("cpu")[1] == 2 * 129 * block  # float32
    assert need_of(max_model_len=1000)[1] == 33 * block
    assert need_of(kv_cache_mib=5000)[1] == 5000 * MIB
    assert need_of("cpu", kv_cache_mib=5000)[1] == 2 * 129 * block, "mapped as it is used"


def test_hybrid_needs_two_states() -> None:
    """One runs, one is its snapshot; only layers with attention have a KV cache."""
    linear = LinearAttentionSpec(
        num_key_heads=16, num_value_heads=16, key_head_dim=128, value_head_dim=128
    )
    spec = msgspec.structs.replace(SPEC, linear_layers=tuple(range(12)), linear_attention=linear)
    need = memory_need(spec, WEIGHTS, Engine(), kind="cuda")
    assert need.cache == 129 * 32 * 16384 + 2 * spec.state_bytes_per_sequence(2)


def test_missing_is_told_by_device() -> None:
    """A device that nobody has measured is taken to have room."""
    assert missing_bytes({0: 10, 1: 10, 2: 10}, {0: 4, 1: 12}) == {0: 6}


def test_advice_names_what_would_fit_and_nothing_else() -> None:
    """Quantisations from the best on, and a shorter context when the weights themselves fit."""
    cache, scratch = need_of()[1], SCRATCH_BYTES["cuda"]

    def advice(free_bytes: int, **fields: Any) -> list[str]:
        settings = Engine(**fields)
        return what_fits(SPEC, WEIGHTS, settings, kind="cuda", world_size=1, free_bytes=free_bytes)

    assert advice(2 * GIB + cache + scratch) == ['quant = "q8_0"', 'quant = "q4_0"']
    assert advice(2 * GIB + cache + scratch - 1) == ['quant = "q4_0"']
    assert advice(GIB) == []
    shorter = advice(4 * GIB + scratch + 33 * 32 * 65536)
    assert shorter[-1] == "engine.max_model_len = 1024"
    assert advice(6 * GIB, kv_cache_mib=9000)[-1] == "a smaller engine.kv_cache_mib"
    assert (
        memory_need(SPEC, WEIGHTS, Engine(max_model_len=1024), kind="cuda").total
        <= 4 * GIB + scratch + 33 * 32 * 65536
    )


def test_description_adds_up_the_ranks_of_a_device() -> None:
    """Both ranks of a model that is split on one CPU count there."""
    need = memory_need(SPEC, WEIGHTS, Engine(), kind="cpu", world_size=2)
    text = describe({0: [need, need]}, {0: GIB})
    assert text == (
        "device 0 needs 5.0 GiB (weights 4.0 GiB, KV cache of 4096 tokens 0.5 GiB, working memory "
        "0.5 GiB) and 1.0 GiB are free"
    )
