"""The GPU benchmark without a GPU: it refuses, and what it times runs on a tiny model."""

from __future__ import annotations

import msgspec
import pytest
import torch

from bench import gpu
from bench.gpu import workloads
from bench.gpu.goals import GOALS
from bench.gpu.random_models import QWEN3_0_6B, QWEN3_5_27B, make_engine
from cortexd.models import LinearAttentionSpec, ModelSpec
from engine.engine import Engine
from engine.formats.ggml import GGMLType

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 1200,
}
DENSE = msgspec.structs.replace(QWEN3_0_6B, num_hidden_layers=2, **TINY)
HYBRID = msgspec.structs.replace(
    QWEN3_5_27B,
    num_hidden_layers=2,
    linear_layers=(0,),
    linear_attention=LinearAttentionSpec(
        num_key_heads=1, num_value_heads=2, key_head_dim=16, value_head_dim=16
    ),
    **TINY,
)


# Rows of whole blocks, and a head of its own.
WIDE = msgspec.structs.replace(
    DENSE, hidden_size=256, intermediate_size=256, head_dim=128, tie_word_embeddings=False
)


def engine_of(spec: ModelSpec, quant: GGMLType | None = None) -> Engine:
    torch.set_num_threads(1)
    return make_engine(
        spec,
        torch.device("cpu"),
        dtype=torch.float32,
        backend="reference",
        quant=quant,
        kv_cache_mib=8,
    )


def test_bench_gpu_without_a_device_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, and what to do."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_goals_are_those_of_the_table() -> None:
    """Each once; an unknown one is refused by name."""
    assert sorted(goal.name for goal in GOALS) == sorted(f"G{n}" for n in range(1, 14))
    with pytest.raises(SystemExit):
        gpu.main(["--goals", "G99"])


@pytest.mark.parametrize(
    ("spec", "quant"),
    [(DENSE, None), (HYBRID, None), (WIDE, GGMLType.Q4_K)],
    ids=["dense", "hybrid", "quantised"],
)
def test_workloads_run_to_their_end(spec: ModelSpec, quant: GGMLType | None) -> None:
    """Decoding, prefill and turns leave nothing behind; a warm turn takes the cached prefix."""
    engine = engine_of(spec, quant)
    assert len(workloads.decode_step_s(engine, batch=2, context=20, num_steps=3)) == 3
    assert workloads.prefill_tok_s(engine, num_prompts=2, length=40) > 0
    cached = engine.report("m").num_cached_tokens
    workloads.turns(engine, length=100, num_new=10)
    assert engine.report("m").num_cached_tokens >= cached + 64
    assert not engine.has_work


def test_offline_workload_counts_every_token() -> None:
    """So many tokens come as were asked for."""
    assert workloads.offline_tok_s(engine_of(DENSE), num_requests=2) > 0
