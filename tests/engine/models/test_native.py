"""A quantised model whose step is one native call, against the same model in plain torch."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from cortexd.models import ModelFiles, ModelSpec, RopeSpec
from engine.kernels.cpu.linear import TYPE_NUMBERS
from engine.models.registry import REGISTRY
from tests.engine.checkpoints import load_engine
from tests.engine.doubles import make_submit
from tests.engine.driving import OWNER, generate, record, run_to_end
from tests.engine.model_files import write_gguf

VOCABULARY = 97
WAYS = {
    "rounded": {"activations": "rounded"},
    "exact": {"activations": "exact"},
    "reference": {"backend": "reference"},
}
PROMPTS = [[(7 * i + 3 * n) % 90 for i in range(n)] for n in range(5, 21)]


def make_files(folder: Path, model_type: str, types: dict[str, str] | None = None) -> ModelFiles:
    """Write a tiny model in Q4_1 with a tied Q8_0 embedding; `types` are exceptions by suffix."""
    spec = ModelSpec(
        model_type=model_type,
        architecture=model_type,
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        rms_norm_eps=1e-5,
        max_position_embeddings=256,
        rope=RopeSpec(),
        tie_word_embeddings=True,
    )
    random = np.random.default_rng(0)
    tensors = {}
    for name, shape in REGISTRY[model_type].plan(spec).required.items():
        values = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            tensors[name] = (1 + values / 10, gguf.GGMLQuantizationType.F32)
            continue
        chosen = [kind for suffix, kind in (types or {}).items() if name.endswith(suffix)]
        default = "Q8_0" if "embed" in name else "Q4_1"
        kind = gguf.GGMLQuantizationType[chosen[0] if chosen else default]
        tensors[name] = (gguf.quants.quantize(values * 0.15, kind), kind)
    return write_gguf(folder / "model.gguf", spec, tensors)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "mixed",
    [
        {},
        {"v_proj.weight": "Q8_0", "down_proj.weight": "Q5_0"},
        {"v_proj.weight": "F16", "down_proj.weight": "BF16", "embed_tokens.weight": "F32"},
        {"proj.weight": "BF16", "embed_tokens.weight": "BF16"},
    ],
)
def test_native_logits_match_the_reference(
    model_type: str, mixed: dict[str, str], tmp_path: Path
) -> None:
    files = make_files(tmp_path, model_type, mixed)
    logits = {}
    for name, settings in WAYS.items():
        engine = load_engine(files, **settings)
        assert engine.backend_name == ("reference" if name == "reference" else "native")
        recorder = record(engine)
        generate(engine, PROMPTS[-1] * 4, max_tokens=1)  # 80 tokens: three chunks
        logits[name] = recorder.logits[0]
    size = logits["reference"].norm()
    assert (logits["exact"] - logits["reference"]).abs().max() < 1e-3
    assert (logits["exact"] - logits["reference"]).norm() < 1e-4 * size
    # Activations of 8 bits, or in bfloat16.
    assert (logits["rounded"] - logits["reference"]).norm() < 3e-2 * size


def test_native_text_is_the_same_alone_and_among_sixteen(tmp_path: Path) -> None:
    files = make_files(tmp_path, "llama")
    engine = load_engine(files)
    alone = [generate(engine, prompt, max_tokens=12, ignore_eos=True) for prompt in PROMPTS]
    for number, prompt in enumerate(PROMPTS):
        submit = make_submit(prompt, number, max_tokens=12, ignore_eos=True)
        engine.submit(OWNER, submit)
    outcomes = run_to_end(engine)
    assert [outcomes[number].token_ids for number in range(len(PROMPTS))] == alone


def test_native_logits_do_not_depend_on_the_prefill_chunk(tmp_path: Path) -> None:
    files = make_files(tmp_path, "qwen3")
    logits = []
    for chunk in (16, 32, 64):
        engine = load_engine(files, max_prefill_chunk=chunk)
        recorder = record(engine)
        generate(engine, PROMPTS[-1] * 3, max_tokens=3, ignore_eos=True)
        logits.append(torch.stack(recorder.logits))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_model_with_a_type_without_kernel_keeps_the_linears_that_have_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(TYPE_NUMBERS, "MXFP4")
    engine = load_engine(make_files(tmp_path, "llama", {"o_proj.weight": "MXFP4"}))
    assert engine.backend_name == "native layers"
    assert len(generate(engine, PROMPTS[0], max_tokens=2, ignore_eos=True)) == 2
