"""A llama from GGUF against transformers with the same, dequantised, weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from tests.engine.checkpoints import (
    load_engine,
    make_oracle,
    oracle_greedy,
    oracle_logits,
    random_prompt,
)
from tests.engine.doubles import make_submit
from tests.engine.driving import generate, max_difference, record
from tests.engine.llama_export import HIDDEN_SIZE, write_gguf


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("kind", [Type.F32, Type.BF16, Type.Q8_0, Type.Q4_1])
def test_gguf_equals_transformers_with_the_same_weights(
    kind: Type, is_tied: bool, tmp_path: Path
) -> None:
    """Rope rows are un-permuted, blocks decoded, and the tied head found."""
    oracle = make_oracle(
        "llama",
        seed=int(kind),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=64,
        tie_word_embeddings=is_tied,
    )
    engine = load_engine(write_gguf(oracle, tmp_path / "m.gguf", kind), backend="reference")
    assert (engine.dtype_name, engine.backend_name) == ("float32", "reference")
    recorder = record(engine)
    for length in (1, 40, 70):
        prompt = random_prompt(length)
        recorder.logits.clear()
        tokens = generate(engine, prompt, max_tokens=5, ignore_eos=True)
        assert max_difference(recorder.logits[0], oracle_logits(oracle, prompt)) < 1e-4
        assert tokens == oracle_greedy(oracle, prompt, tokens, 5)


def test_gguf_rope_factors_divide_the_frequencies(tmp_path: Path) -> None:
    """The llama3 scaling of GGUF files equals transformers' own."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    fields = {"hidden_size": HIDDEN_SIZE, "intermediate_size": 64, "seed": 30}
    oracle = make_oracle("llama", rope_parameters=scaling, **fields)
    plain = make_oracle("llama", **fields)
    scaled = oracle.model.rotary_emb.inv_freq
    factors = plain.model.rotary_emb.inv_freq / scaled
    assert float(factors.max()) > 7
    engine = load_engine(write_gguf(oracle, tmp_path / "m.gguf", Type.F32, factors))
    prompt = random_prompt(50)
    recorder = record(engine)
    generate(engine, prompt, max_tokens=1)
    assert max_difference(recorder.logits[0], oracle_logits(oracle, prompt)) < 1e-4


@pytest.mark.parametrize(("activations", "tolerance"), [("exact", 1e-3), ("rounded", 0.15)])
def test_native_kernels_stay_near_the_reference_and_are_batch_invariant(
    activations: str, tolerance: float, tmp_path: Path
) -> None:
    """The fast backend computes what the reference does, with the same bits in any batch."""
    oracle = make_oracle("llama", seed=31, hidden_size=HIDDEN_SIZE, intermediate_size=64)
    files = write_gguf(oracle, tmp_path / "m.gguf", Type.Q8_0)
    prompts = [random_prompt(length, seed=length) for length in (5, 20, 31)]
    alone: list[Tensor] = []
    for prompt in prompts:
        engine = load_engine(files, activations=activations)
        recorder = record(engine)
        generate(engine, prompt, max_tokens=3, ignore_eos=True)
        alone.append(torch.stack(recorder.logits))
        expected = oracle_logits(oracle, prompt)
        assert max_difference(recorder.logits[0], expected) < tolerance * float(expected.std())
    engine = load_engine(files, activations=activations)
    recorder = record(engine)
    for index, prompt in enumerate(prompts):
        engine.submit("f", make_submit(prompt, sequence_id=index, max_tokens=3, ignore_eos=True))
    while engine.has_work:
        engine.step()
    together = torch.stack(recorder.logits).view(3, 3, -1).transpose(0, 1)
    # Without a compiler the reference runs, whose products round differently for each batch size.
    difference = 0.0 if engine.backend_name == "native" else 1e-4
    for index in range(3):
        assert max_difference(together[index], alone[index]) <= difference


def test_native_prompt_in_chunks_has_the_bits_of_one_pass(tmp_path: Path) -> None:
    """However a prompt is cut, and whichever path computed a position, logits are the same."""
    oracle = make_oracle("llama", seed=32, hidden_size=HIDDEN_SIZE, intermediate_size=64)
    files = write_gguf(oracle, tmp_path / "m.gguf", Type.Q8_0)
    prompt = random_prompt(60)
    seen: list[Tensor] = []
    for chunk in (16, 33, 64):
        engine = load_engine(files, max_prefill_chunk=chunk, prefix_cache=False)
        recorder = record(engine)
        tokens = generate(engine, prompt, max_tokens=4, ignore_eos=True)
        seen.append(torch.stack(recorder.logits))
    # The last generated token decoded beside prefilled ones: prefill all of it once more.
    recorder.logits.clear()
    generate(engine, prompt + tokens[:3], max_tokens=1, ignore_eos=True)
    tolerance = 0.0 if engine.backend_name == "native" else 1e-4
    for logits in seen:
        assert max_difference(logits, seen[-1]) <= tolerance
    assert max_difference(recorder.logits[0], seen[-1][3]) <= tolerance
