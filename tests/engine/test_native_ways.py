"""How a prompt is computed makes no difference to the CPU's kernels, however they round.

Each format is multiplied by a kernel of its own, and by another one when activations are rounded to
8 bits (or bfloat16). What a model answers has the same bits on every way, hybrids and mixtures of
experts included.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from engine.kernels import cpu as native
from tests.engine.checkpoints import random_prompt
from tests.engine.doubles import make_submit
from tests.engine.driving import OWNER, generate, max_difference, run_to_end
from tests.engine.stored_models import store_model
from tests.engine.ways import PROMPTS, WAYS, Load, in_one_pass

# Architecture and format.
MODELS = [
    ("llama", "GGUF q8_0"),
    ("llama", "GGUF q4_1"),
    ("qwen3", "in-situ q4_0"),
    ("llama", "GGUF bf16"),
    ("qwen3_5", "GGUF q8_0"),
    ("qwen3_next", "GGUF bf16"),
    ("qwen3_moe", "in-situ q8_0"),
    ("qwen3_5_moe", "GGUF q4_1"),
]

pytestmark = pytest.mark.skipif(not native.available(), reason="no native kernels here")


def loader(architecture: str, stored_as: str, activations: str, directory: Path) -> Load:
    """Write the model; return what loads it."""
    stored = store_model(architecture, stored_as, directory / "model", backend="auto")
    return partial(stored.load, activations=activations)


@pytest.fixture(scope="module", params=MODELS, ids=" ".join)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Load]:
    """What loads one model, by how it rounds activations."""
    architecture, stored_as = request.param
    return {
        activations: loader(
            architecture, stored_as, activations, tmp_path_factory.mktemp(activations)
        )
        for activations in ("rounded", "exact")
    }


@pytest.mark.parametrize("activations", ["rounded", "exact"])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "in_one_pass"])
def test_every_way_has_the_bits_of_one_pass(
    way: str, activations: str, model: dict[str, Load]
) -> None:
    """Chunks, single tokens, batches, used blocks, preemption and prefix hits."""
    load = model[activations]
    assert load().backend_name == "native"
    prompt = PROMPTS["random"]
    assert torch.equal(WAYS[way](load, prompt), in_one_pass(load, prompt))


def test_rounding_is_really_done(model: dict[str, Load]) -> None:
    """The tests above would hold trivially if both settings ran the same kernels."""
    prompt = PROMPTS["random"]
    rounded, exact = (in_one_pass(model[name], prompt) for name in ("rounded", "exact"))
    spread = float(exact.std())
    assert 1e-4 * spread < max_difference(rounded, exact) < 0.5 * spread


def test_greedy_answers_do_not_depend_on_company(model: dict[str, Load]) -> None:
    """Rounded: alone in small chunks, all in one batch, and after a hit, each says the same."""
    load = model["rounded"]
    prompts = [random_prompt(length, seed=length) for length in (1, 33, 70, 150)]
    alone = load(prefix_cache=False, max_prefill_chunk=17)
    expected = [generate(alone, prompt, max_tokens=8, ignore_eos=True) for prompt in prompts]
    engine = load()
    for _ in range(2):  # the second time most of it is found in the prefix cache
        for index, prompt in enumerate(prompts):
            submit = make_submit(prompt, sequence_id=index, max_tokens=8, ignore_eos=True)
            engine.submit(OWNER, submit)
        outcomes = run_to_end(engine)
        assert [outcomes[index].token_ids for index in range(len(prompts))] == expected
    # A hybrid's hits end at a snapshot, of which there may be one per prompt.
    cached = 32 + 64 + 144 if engine.cache.states is None else 32
    assert engine.report("m").num_cached_tokens >= cached
