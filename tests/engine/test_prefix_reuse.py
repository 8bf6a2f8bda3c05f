"""The engine with shared prefixes: the same numbers as a cold run, and what it reports."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from cortexd import errors
from engine.cache.prefix_tree import PrefixTree
from engine.engine import Engine
from tests.engine.checkpoints import (
    VOCAB_SIZE,
    load_engine,
    make_oracle,
    random_prompt,
    save_oracle,
)
from tests.engine.doubles import make_submit
from tests.engine.driving import OWNER, max_difference, record, run_to_end
from tests.engine.llama_export import HIDDEN_SIZE, write_gguf
from tests.engine.ways import Load

# Repeated text, near-identical blocks, and plain random tokens.
HEADS = {
    "random": random_prompt(75, seed=1),
    "repeated": [5] * 75,
    "near": [*([5] * 31), 6] * 2 + [5] * 11,
}


# End of a message, and a chat's answer header: start, role, new line, opening of the reasoning.
END_TOKEN = VOCAB_SIZE - 1
ANSWER_HEADER, REASONING = [90, 91, 92], [93, 92]


@pytest.fixture(scope="module", params=["exact", "rounded", "qwen3", "qwen3_5", "qwen3_next"])
def load(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Load:
    """A tiny llama packed for the CPU's kernels; dense and hybrid models in float32."""
    directory = tmp_path_factory.mktemp(request.param)
    if request.param in {"exact", "rounded"}:
        oracle = make_oracle(
            "llama",
            seed=50,
            hidden_size=HIDDEN_SIZE,
            intermediate_size=64,
            max_position_embeddings=1024,
        )
        files = write_gguf(oracle, directory / "m.gguf", Type.Q8_0)
        return partial(load_engine, files, activations=request.param)
    oracle = make_oracle(request.param, seed=51, max_position_embeddings=1024)
    return partial(load_engine, save_oracle(oracle, directory / request.param))


def logits_of(engine: Engine, prompt: list[int], **fields: object) -> tuple[Tensor, int]:
    """Run a prompt; return the logits of its answer's tokens, and how many tokens were cached."""
    recorder = record(engine)
    engine.submit(OWNER, make_submit(prompt, max_tokens=4, ignore_eos=True, **fields))
    outcome = run_to_end(engine)[1]
    engine.model = recorder.model
    return torch.stack(recorder.logits), max(d.num_cached_tokens for d in outcome.deltas)


def tolerance(engine: Engine) -> float:
    """Return how far a hit may be from a cold run: nothing at all with the native kernels."""
    if engine.backend_name == "native":
        return 0.0
    # The delta rule sums over chunks, which a hit cuts elsewhere.
    return 1e-5 if engine.cache.states is None else 1e-4


@pytest.mark.parametrize("kind", list(HEADS))
def test_hit_has_the_numbers_of_a_cold_run(load: Load, kind: str) -> None:
    """A prefix computed in other chunks, for another request, gives the very same logits."""
    head = HEADS[kind]
    prompts = [head + random_prompt(length, seed=length) for length in (1, 9, 40)]
    cold = [logits_of(load(prefix_cache=False), prompt)[0] for prompt in prompts]
    engine = load(max_prefill_chunk=16, block_size=8)
    logits_of(engine, head)
    for prompt, expected in zip(prompts, cold, strict=True):
        logits, num_cached = logits_of(engine, prompt)
        assert num_cached == 72
        assert max_difference(logits, expected) <= tolerance(engine)


def test_wrong_share_changes_the_numbers(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: blocks found by all but their last token are wrong ones."""
    prompt = random_prompt(75, seed=1)
    other = [*prompt[:31], 3, *prompt[32:]]
    cold, _ = logits_of(load(prefix_cache=False), other)
    real = PrefixTree.block_tokens
    monkeypatch.setattr(PrefixTree, "block_tokens", lambda *args: (*real(*args)[:-1], 0))
    engine = load()
    logits_of(engine, prompt)
    logits, num_cached = logits_of(engine, other)
    assert num_cached == 72
    assert max_difference(logits, cold) > 1e-3


def test_answers_to_one_prompt_share_its_blocks(load: Load) -> None:
    """Four answers hold the prompt's full blocks once, and each draws as if it were alone."""
    prompt = random_prompt(70)
    fields = {"temperature": 0.9, "max_tokens": 6, "ignore_eos": True}
    alone = load(prefix_cache=False)
    expected = []
    for seed in range(4):
        alone.submit(OWNER, make_submit(prompt, seed=seed, **fields))
        expected.append(run_to_end(alone)[1].token_ids)
    engine = load()
    for seed in range(4):
        engine.submit(OWNER, make_submit(prompt, sequence_id=seed, seed=seed, **fields))
    for _ in range(4):
        deltas = engine.step()
    assert len(deltas[OWNER]) == 4
    assert engine.scheduler.pool.num_used == 8 + 4  # 64 tokens shared, 6 and the answer own
    tables = [sequence.block_table for sequence in engine.scheduler.running]
    assert {tuple(table[:8]) for table in tables} == {tuple(tables[0][:8])}
    engine.close()
    for seed in range(4):
        engine.submit(OWNER, make_submit(prompt, sequence_id=seed, seed=seed, **fields))
    outcomes = run_to_end(engine)
    assert [outcomes[seed].token_ids for seed in range(4)] == expected


def test_conversation_reuses_nearly_all_of_the_turn_before(load: Load) -> None:
    """Each turn finds at least 95 % of the prompt before, and says what a cold engine says."""
    engine = load(block_size=8)
    cold = load(prefix_cache=False)
    prompt = random_prompt(150)
    previous = 0
    for turn in range(4):
        # An end token in the middle of an answer would mark the end of a message.
        fields = {"max_tokens": 6, "logit_bias": {END_TOKEN: -100.0}, "sequence_id": turn}
        cold.submit(OWNER, make_submit(prompt, **fields))
        engine.submit(OWNER, make_submit(prompt, **fields))
        outcome = run_to_end(engine)[turn]
        assert outcome.token_ids == run_to_end(cold)[turn].token_ids
        first = next(delta for delta in outcome.deltas if delta.token_ids)
        assert first.num_cached_tokens >= 0.95 * previous
        previous = len(prompt)
        prompt = prompt + outcome.token_ids + random_prompt(5, seed=turn)
    report = engine.report("m")
    assert report.num_cached_tokens >= 0.95 * (150 + 161 + 172)
    assert report.kv_blocks_used == 0
    assert report.kv_blocks_cached > 0


def test_conversation_whose_reasoning_is_stripped_reuses_the_prompt_before(
    load: Load,
) -> None:
    """Clients send answers back without what was thought; each prompt is found again all the same.

    What a hybrid keeps is the state at the end of the last message, before the answer's header.
    """
    engine = load(block_size=8)
    history = [*random_prompt(280, seed=1), END_TOKEN]
    previous = 0
    for turn in range(4):
        prompt = history + ANSWER_HEADER + REASONING
        fields = {"max_tokens": 20, "ignore_eos": True, "sequence_id": turn}
        engine.submit(OWNER, make_submit(prompt, **fields))
        outcome = run_to_end(engine)[turn]
        num_cached = max(delta.num_cached_tokens for delta in outcome.deltas)
        assert num_cached >= 0.95 * previous
        previous = len(prompt)
        history += [*ANSWER_HEADER, *outcome.token_ids[12:], END_TOKEN]
        history += [*random_prompt(9, seed=turn), END_TOKEN]


def test_row_that_is_not_finite_leaves_nothing_behind(load: Load) -> None:
    """KV behind NaN logits is not trusted: the same prompt is computed anew and answered."""
    prompt = random_prompt(70)
    engine = load()
    recorder = record(engine)
    recorder.spoil = {0: float("nan")}
    engine.submit(OWNER, make_submit(prompt))
    outcome = run_to_end(engine)[1]
    assert outcome.error is not None
    assert outcome.error.code == errors.NonFiniteLogits.code
    engine.model = recorder.model
    assert logits_of(engine, prompt)[1] == 0
    assert logits_of(engine, prompt)[1] == 64
