"""The derived context and the KV figures that an engine reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from cortexd.settings import Engine as EngineSettings
from engine.cache.context_limit import offered_context, rounded
from engine.scheduling.step_plan import PlannedRow, StepPlan
from tests.engine.checkpoints import load_engine, make_oracle, random_prompt, save_oracle
from tests.engine.doubles import make_sequence, make_submit
from tests.engine.driving import OWNER, run_to_end


@pytest.mark.parametrize(
    ("context", "rate", "target_s", "expected"),
    [
        (32768, 0.0, 120.0, 32768),  # 800 tokens per second are assumed: 96000
        (262144, 0.0, 120.0, 95232),
        (262144, 5000.0, 120.0, 262144),
        (262144, 100.0, 120.0, 11264),
        (262144, 1.0, 120.0, 4096),
        (2048, 1.0, 120.0, 2048),
        (262144, 1.0, 0.0, 262144),
    ],
)
def test_context_is_what_prefill_gets_through(
    context: int, rate: float, target_s: float, expected: int
) -> None:
    """Whole steps of 1024, at least 4096, never more than the cache holds; 0 seconds: no limit."""
    settings = EngineSettings(target_prefill_s=target_s)
    assert offered_context(context, rate, settings) == expected


def test_rounding_keeps_what_is_below_a_step() -> None:
    """Tiny models are not rounded away."""
    assert [rounded(each) for each in (1000, 1024, 2047)] == [1000, 1024, 1024]


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_5"])
def test_kv_is_told_in_bytes(kind: str, tmp_path: Path) -> None:
    """What runs is used, what waits is announced, and all adds up to the cache's own figures."""
    files = save_oracle(make_oracle(kind), tmp_path / "m")
    engine = load_engine(files, max_num_seqs=1, prefix_cache=False)
    slot, block = engine.cache.slot_bytes, engine.cache.block_bytes
    assert (slot > 0) == (kind == "qwen3_5")
    spare = block + slot  # the null block and the null slot
    assert engine.report("m").kv_bytes_total == engine.cache.memory_bytes - spare
    for index, length in enumerate((20, 40)):
        submit = make_submit(random_prompt(length), sequence_id=index, max_tokens=2)
        engine.submit(OWNER, submit)
    engine.step()
    report = engine.report("m")
    assert report.kv_bytes_used == 3 * block + slot  # 20 tokens in blocks of 8
    assert report.kv_bytes_waiting == 6 * block + slot  # 40 and the first answer token
    run_to_end(engine)
    report = engine.report("m")
    assert (report.kv_bytes_used, report.kv_bytes_waiting) == (0, 0)


def test_only_long_prefill_steps_change_the_offered_context(tmp_path: Path) -> None:
    """Short prompts are slow per token, and decodes share a step: neither says anything."""
    files = save_oracle(make_oracle("qwen3", max_position_embeddings=32768), tmp_path / "m")
    engine = load_engine(files, kv_cache_mib=64, target_prefill_s=1.0, block_size=256)
    assert engine.limits.context == 32768
    assert engine.figures.offered.context == 4096  # 800 tokens in one second, which is too few
    prefill = PlannedRow(make_sequence([1] * 99), 0, 32, samples=False)
    fast_s = 32 / 20_000
    for rows, num_decodes in (
        ([prefill], 1),
        ([PlannedRow(prefill.sequence, 0, 15, samples=False)], 0),
    ):
        engine.figures.count_step(StepPlan(rows, num_decodes), fast_s)
        assert engine.figures.offered.context == 4096
    engine.figures.count_step(StepPlan([prefill], 0), fast_s)
    assert engine.figures.offered.context == 19456
    assert engine.report("m").context == 19456
    assert engine.figures.offered.output == 19455
