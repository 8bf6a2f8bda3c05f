"""How large the KV cache is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from cortexd import errors
from cortexd.models import LinearAttentionSpec, ModelSpec
from cortexd.settings import Engine as EngineSettings
from engine.cache.kv_cache import MIB, CacheSize, KVCache, choose_size
from tests.engine.doubles import TINY

# 2 (K and V) * 4 layers * 2 heads * 64 elements * 4 bytes = 4 KiB per token, 128 KiB per block.
SPEC = msgspec.structs.replace(
    TINY,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=4096,
)


def size_for(spec: ModelSpec = SPEC, free_mib: int = 1000, **fields: Any) -> CacheSize:
    """Return the size on a CPU with so much free memory."""
    return choose_size(EngineSettings(**fields), spec, 4, free_mib * MIB, "cpu")


def test_size_set_by_the_user_is_kept() -> None:
    """kv_cache_mib decides; the context is what the blocks but one hold."""
    assert size_for(kv_cache_mib=4) == CacheSize(num_blocks=32, context=31 * 32)


def test_size_auto_takes_a_quarter_of_free_memory_on_a_cpu() -> None:
    """A quarter of 100 MiB holds 200 blocks."""
    assert size_for(free_mib=100) == CacheSize(num_blocks=200, context=4096)


def test_size_auto_on_a_cpu_stops_at_what_is_sufficient() -> None:
    """Of 100 GiB two are taken; more only when one sequence of full length needs it."""
    assert size_for(free_mib=102_400, max_num_seqs=256).num_blocks == 2048 * 8
    long = msgspec.structs.replace(SPEC, max_position_embeddings=2**20)
    assert size_for(long, free_mib=102_400) == CacheSize(2**15 + 1, 2**20)
    assert size_for(long, free_mib=8192).context == 2048 * 256 - 1024  # whole steps of 1024


def test_size_auto_takes_no_more_than_all_seats_can_use() -> None:
    """Two seats of 4096 tokens need 256 blocks, and one is the null block."""
    assert size_for(free_mib=100_000, max_num_seqs=2) == CacheSize(num_blocks=257, context=4096)


def test_context_is_the_smallest_of_model_setting_and_cache() -> None:
    """max_model_len only ever lowers the model's own limit."""
    assert size_for(max_model_len=100).context == 100
    assert size_for(max_model_len=100_000).context == 4096


def test_size_too_small_for_two_blocks_is_refused_with_both_numbers() -> None:
    """The error says what is needed and what there is."""
    with pytest.raises(errors.InsufficientMemory, match=f"at least {2 * 131072} bytes") as caught:
        size_for(free_mib=0)
    assert caught.value.details == {"needed_bytes": 262144, "available_bytes": 0}


def test_hybrid_needs_room_for_two_states_as_well() -> None:
    """Few layers have a KV cache; each sequence that may run has a state of fixed size."""
    # 3 layers * (4 heads * 64 * 64 * 4 bytes + 3 * 512 * 4 bytes) = 215040 bytes per sequence.
    linear = LinearAttentionSpec(
        num_key_heads=2, num_value_heads=4, key_head_dim=64, value_head_dim=64
    )
    spec = msgspec.structs.replace(SPEC, linear_layers=(0, 1, 2), linear_attention=linear)
    assert spec.state_bytes_per_sequence(4) == 215040
    assert size_for(spec, max_num_seqs=8).num_state_slots == 16  # as many again for snapshots
    assert size_for(spec, max_num_seqs=8, prefix_cache=False).num_state_slots == 8
    tight = size_for(spec, kv_cache_mib=2)
    assert (tight.num_state_slots, tight.num_blocks) == (3, 2**21 // 32768 - 27)
    with pytest.raises(errors.InsufficientMemory, match="and two recurrent states") as caught:
        size_for(spec, free_mib=1)
    assert caught.value.details["needed_bytes"] == 2 * (32768 + 215040)


def test_cache_views_share_one_memory() -> None:
    """A token written by slot is found by block."""
    cache = KVCache(SPEC, CacheSize(3, 64), 32, torch.float32, torch.device("cpu"))
    assert cache.memory_bytes == 3 * 131072
    cache.slots(1)[35] = 7.0
    assert float(cache.layer(1)[1, 3].sum()) == 7.0 * 4 * 64
    assert cache.layer(0).shape == (3, 32, 4, 64)


def test_cpu_memory_is_asked_for_in_huge_pages() -> None:
    """The kernel marks the mapping with hg."""
    cache = KVCache(SPEC, CacheSize(64, 2048), 32, torch.float32, torch.device("cpu"))
    flags = _mapping_flags(cache.blocks.data_ptr())
    assert "hg" in flags, flags


def _mapping_flags(address: int) -> list[str]:
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if first == "VmFlags:" and is_inside:
            return rest
        if not first.endswith(":"):
            begin, end = (int(bound, 16) for bound in first.split("-"))
            is_inside = begin <= address < end
    raise AssertionError(f"{address:x} is not mapped")
