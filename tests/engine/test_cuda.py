"""The suite of `ways.py` on a CUDA device: every architecture, stored format and backend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.exactness import ARCHITECTURES
from tests.engine.checkpoints import oracle_logits, random_prompt
from tests.engine.driving import generate, max_difference, record
from tests.engine.stored_models import store_model
from tests.engine.ways import PROMPTS, WAYS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FORMATS = ("safetensors f32", "in-situ q8_0", "GGUF q4_1")
# Sums in another order than on a CPU; torch computes float32 there without TF32 by default.
TOLERANCE = 1e-3
LENGTHS = (1, 7, 33, 75, 140)


@pytest.mark.parametrize("stored_as", FORMATS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_way_equals_transformers_in_float32(
    architecture: str, stored_as: str, tmp_path: Path
) -> None:
    """The torch path on the device gives the CPU's numbers, however the prompt is computed."""
    model = store_model(architecture, stored_as, tmp_path / "model")
    prompt = PROMPTS["random"]
    expected = oracle_logits(model.oracle, prompt)
    for name, way in WAYS.items():
        logits = way(lambda **fields: model.load(device="cuda", **fields), prompt)
        assert max_difference(logits.cpu(), expected) < TOLERANCE, name


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("stored_as", ["safetensors bf16", "GGUF q8_0"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_agrees_on_the_token(
    architecture: str, stored_as: str, backend: str, tmp_path: Path
) -> None:
    """Logits stay near those of float32; the best token is the same unless two are as near."""
    model = store_model(architecture, stored_as, tmp_path / "model", backend=backend)
    engine = model.load(device="cuda", dtype="bfloat16")
    recorder = record(engine)
    # With experts, rounding now and then sends a token to another one.
    least = 0.9 if "moe" in architecture or architecture == "qwen3_next" else 0.98
    for length in LENGTHS:
        prompt = random_prompt(length)
        generate(engine, prompt, max_tokens=1, ignore_eos=True)
        ours, theirs = recorder.logits[-1].cpu(), oracle_logits(model.oracle, prompt)
        assert float(torch.cosine_similarity(ours, theirs, dim=0)) > least
        chosen, best = theirs[ours.argmax()], theirs.max()
        assert float(best - chosen) < 0.25 * float(theirs.std())
