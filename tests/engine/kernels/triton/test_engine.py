"""Whole models on the Triton kernels against the same models in plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cortexd import errors
from cortexd.models import ModelFiles
from cortexd.settings import Engine as EngineSettings
from engine import device as devices
from engine.engine import Engine
from tests.engine.checkpoints import load_engine, make_oracle, random_prompt, save_oracle
from tests.engine.doubles import make_submit
from tests.engine.driving import OWNER, generate, record, run_to_end
from tests.engine.kernels.triton.cases import DEVICE
from tests.engine.models.test_native import make_files

PROMPTS = [random_prompt(length) for length in (2, 21)]
# The interpreter takes a millisecond for every head of every token.
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1}
HYBRID = {**SMALL, "layer_types": ["linear_attention", "full_attention"]}


def load(files: ModelFiles, backend: str, **fields: object) -> Engine:
    return load_engine(files, backend=backend, device=DEVICE.type, **fields)


def run(engine: Engine) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Answer prompts that prefill in chunks while others decode; return tokens and logits."""
    recorder = record(engine)
    for number, prompt in enumerate(PROMPTS):
        engine.submit(OWNER, make_submit(prompt, number, max_tokens=3, ignore_eos=True))
    outcomes = run_to_end(engine)
    return [outcomes[n].token_ids for n in range(len(PROMPTS))], recorder.logits


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", SMALL),
        ("qwen3", {**SMALL, "tie_word_embeddings": True}),
        ("qwen3_5", HYBRID),
        ("qwen3_next", HYBRID),
        ("qwen3_moe", SMALL),
    ],
)
def test_engine_on_triton_equals_torch(
    kind: str, fields: dict[str, object], tmp_path: Path
) -> None:
    """Tokens are equal, logits close: dense, with head norms, hybrid, with experts."""
    files = save_oracle(make_oracle(kind, **fields), tmp_path / kind)
    engine = load(files, "triton", max_prefill_chunk=16)
    assert engine.backend_name == "triton"
    found, logits = run(engine)
    expected, expected_logits = run(load(files, "reference", max_prefill_chunk=16))
    assert found == expected
    # Steps of decode rows only draw on the device and do not pass the recorder.
    torch.testing.assert_close(logits[0], expected_logits[0], atol=1e-4, rtol=1e-4)


def test_quantised_model_on_triton_equals_torch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Matrices and the tied head stay quantised; what has no kernel is named once."""
    types = {"o_proj.weight": "MXFP4", "proj.weight": "Q4_0"}
    files = make_files(tmp_path, "llama", types)
    logits = {}
    for backend in ("triton", "reference"):
        engine = load(files, backend)
        recorder = record(engine)
        generate(engine, PROMPTS[1], max_tokens=2, ignore_eos=True)
        logits[backend] = recorder.logits
    torch.testing.assert_close(logits["triton"][0], logits["reference"][0], atol=1e-4, rtol=1e-4)
    warnings = [r for r in caplog.records if r.message == "weights.without_kernel"]
    assert [record.cortexd_fields["types"] for record in warnings] == [["MXFP4"]]


def test_hybrid_in_bfloat16_stays_near_torch(tmp_path: Path) -> None:
    """Rounding points are the reference's, so logits differ by a few roundings only."""
    files = save_oracle(make_oracle("qwen3_5", **HYBRID), tmp_path / "model")
    _, logits = run(load(files, "triton", dtype="bfloat16"))
    _, expected = run(load(files, "reference", dtype="bfloat16"))
    spread = expected[0].std()
    assert (logits[0] - expected[0]).abs().max() < 0.2 * spread


def test_demanding_triton_where_it_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """No silent fallback when the user asked for the kernels."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    cpu = torch.device("cpu")
    with pytest.raises(errors.ConfigError, match=r'engine.backend = "triton", but .*"reference"'):
        devices.choose_backend(EngineSettings(backend="triton"), cpu)
    assert devices.choose_backend(EngineSettings(), cpu) == "auto"
