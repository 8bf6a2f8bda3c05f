"""The suite of `ways.py` on a CUDA device: every architecture, stored format and backend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.exactness import ARCHITECTURES
from tests.engine.checkpoints import oracle_logits
from tests.engine.driving import max_difference
from tests.engine.rounding import answer
from tests.engine.stored_models import store_model
from tests.engine.ways import PROMPTS, WAYS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FORMATS = ("safetensors f32", "in-situ q8_0", "GGUF q4_1")
# Sums in another order than on a CPU; torch computes float32 there without TF32 by default.
TOLERANCE = 1e-3


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
def test_bfloat16_is_as_near_as_transformers(
    architecture: str, stored_as: str, backend: str, tmp_path: Path
) -> None:
    """Logits are as near to float32 as transformers in bfloat16 gets on the same prompts."""
    model = store_model(architecture, stored_as, tmp_path / "model", backend=backend)
    answer(model.load(device="cuda", dtype="bfloat16"), model.oracle).check()
