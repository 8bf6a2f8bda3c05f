"""The step that memory is measured with is as large as the settings allow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cortexd.settings import Engine as EngineSettings
from engine.largest_step import activation_bytes, run_largest_step
from tests.engine.checkpoints import load_engine, make_oracle, save_oracle
from tests.engine.driving import record


@pytest.mark.parametrize("kind", ["llama", "qwen3_5"])
@torch.inference_mode()
def test_largest_step_holds_all_tokens_that_settings_allow(kind: str, tmp_path: Path) -> None:
    """Prompts of the longest chunk, and a rest; a hybrid's in slots of their own."""
    engine = load_engine(save_oracle(make_oracle(kind), tmp_path / "model"), backend="reference")
    recorder = record(engine)
    settings = EngineSettings(max_num_batched_tokens=100, max_prefill_chunk=40, block_size=16)
    cpu = torch.device("cpu")
    num_bytes = run_largest_step(recorder, engine.spec, settings, torch.float32, cpu)
    assert len(recorder.logits) == 3
    assert num_bytes >= 100 * engine.spec.kv_bytes_per_token(4)
    assert activation_bytes(recorder, engine.spec, settings, torch.float32, cpu) == 0
