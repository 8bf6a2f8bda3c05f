"""Log-probabilities of the prompt: right however it is computed, bounded in what a step holds."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cortexd import errors
from cortexd.messages.inference import PromptScores
from cortexd.models import ModelFiles
from engine.engine import Engine
from engine.sampling.prompt_scores import score_tokens
from engine.scheduling.prefill_chunks import MAX_SCORED_TOKENS
from tests.engine.checkpoints import (
    Oracle,
    load_engine,
    make_oracle,
    random_prompt,
    save_oracle,
)
from tests.engine.doubles import make_submit
from tests.engine.driving import OWNER, Outcome, collect, record, run_to_end
from tests.engine.tp.ranks import engine_of

TOLERANCE = 1e-4
KINDS = ("llama", "qwen3_5_text")


@pytest.fixture(scope="module", params=KINDS)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Oracle, ModelFiles]:
    """A dense and a hybrid model, with the reference implementation's."""
    oracle = make_oracle(request.param, seed=21, max_position_embeddings=512)
    return oracle, save_oracle(oracle, tmp_path_factory.mktemp("scores") / request.param)


@torch.inference_mode()
def expected_logprobs(oracle: Oracle, prompt: list[int]) -> Tensor:
    """Return the reference's log-probabilities (num_tokens, vocab_size) after each prefix."""
    logits: Tensor = oracle(torch.tensor([prompt])).logits[0]
    return logits.float().log_softmax(-1)


def scores_of(outcome: Outcome) -> PromptScores:
    """Return an outcome's scores joined; they come before the first token."""
    joined = PromptScores([], [], [], [])
    has_token = False
    for delta in outcome.deltas:
        if delta.prompt_scores is not None:
            assert not has_token
            assert len(delta.prompt_scores.logprobs) <= MAX_SCORED_TOKENS
            for name in PromptScores.__struct_fields__:
                getattr(joined, name).extend(getattr(delta.prompt_scores, name))
        has_token = has_token or bool(delta.token_ids)
    return joined


def check(scores: PromptScores, logprobs: Tensor, prompt: list[int], num_top: int) -> None:
    """Compare with the reference's `logprobs` (num_tokens, vocab_size)."""
    assert len(scores.logprobs) == len(prompt) - 1
    for index, token_id in enumerate(prompt[1:]):
        row = logprobs[index]
        assert scores.logprobs[index] == pytest.approx(float(row[token_id]), abs=TOLERANCE)
        assert scores.ranks[index] == int((row > row[token_id]).sum()) + 1
        best = row.topk(num_top)
        assert scores.top_ids[index] == best.indices.tolist()
        assert scores.top_logprobs[index] == pytest.approx(best.values.tolist(), abs=TOLERANCE)


def score(engine: Engine, prompt: list[int], **fields: object) -> Outcome:
    """Run one scored sequence alone."""
    engine.submit(OWNER, make_submit(prompt, num_prompt_logprobs=2, ignore_eos=True, **fields))
    return run_to_end(engine)[1]


@pytest.mark.parametrize("chunk", [16, 17, 64])
def test_scores_equal_the_references_at_any_split(
    model: tuple[Oracle, ModelFiles], chunk: int
) -> None:
    """Each chunk scores its own tokens and the next chunk's first one."""
    oracle, files = model
    for length in (1, 2, 17, 70):
        prompt = random_prompt(length)
        outcome = score(load_engine(files, max_prefill_chunk=chunk), prompt, max_tokens=2)
        check(scores_of(outcome), expected_logprobs(oracle, prompt), prompt, 2)
        assert len(outcome.token_ids) == 2


def test_cached_prefix_is_computed_again_for_its_scores(model: tuple[Oracle, ModelFiles]) -> None:
    """A hit would skip positions without logits; a later request without scores may have it."""
    oracle, files = model
    prompt = random_prompt(70)
    engine = load_engine(files)
    answer = []
    for wanted in (-1, 2, -1):
        engine.submit(OWNER, make_submit(prompt, num_prompt_logprobs=wanted, max_tokens=3))
        answer.append(run_to_end(engine)[1])
    check(scores_of(answer[1]), expected_logprobs(oracle, prompt), prompt, 2)
    assert answer[0].token_ids == answer[1].token_ids == answer[2].token_ids
    cached = [max(delta.num_cached_tokens for delta in each.deltas) for each in answer]
    assert cached[0] == cached[1] == 0
    assert cached[2] > 0


def test_answers_to_one_prompt_share_it_and_one_scores_it(model: tuple[Oracle, ModelFiles]) -> None:
    """Of n answers the first alone asks for scores, the others follow it through the cache."""
    oracle, files = model
    prompt = random_prompt(70)
    engine = load_engine(files)
    for index in range(3):
        wanted = 2 if index == 0 else -1
        fields = {"sequence_id": index, "num_prompt_logprobs": wanted, "max_tokens": 4}
        engine.submit(OWNER, make_submit(prompt, **fields))
    outcomes = run_to_end(engine)
    check(scores_of(outcomes[0]), expected_logprobs(oracle, prompt), prompt, 2)
    assert len({tuple(outcome.token_ids) for outcome in outcomes.values()}) == 1
    assert all(outcomes[index].deltas[-4].num_cached_tokens > 0 for index in (1, 2))


def test_preempted_prompt_is_scored_once(model: tuple[Oracle, ModelFiles]) -> None:
    """What was scored before the preemption is neither told nor computed for it again."""
    oracle, files = model
    prompt = random_prompt(100)
    engine = load_engine(files, max_prefill_chunk=16)
    engine.submit(OWNER, make_submit(prompt, num_prompt_logprobs=2, max_tokens=3))
    outcomes: dict[int, Outcome] = defaultdict(Outcome)
    for _ in range(3):
        collect(outcomes, engine.step())
    sequence = engine.scheduler.running[0]
    assert sequence.num_scored == 48
    engine.scheduler._preempt(sequence)
    run_to_end(engine, outcomes)
    check(scores_of(outcomes[1]), expected_logprobs(oracle, prompt), prompt, 2)


def test_a_step_scores_a_bounded_number_of_tokens(model: tuple[Oracle, ModelFiles]) -> None:
    """Several long scored prompts and a plain one: logits never exceed the bound, all end well."""
    oracle, files = model
    limits = {"max_num_batched_tokens": 1024, "max_prefill_chunk": 512, "kv_cache_mib": 4}
    engine = load_engine(files, **limits)
    recorder = record(engine)
    prompts = [random_prompt(length, seed=length) for length in (400, 300, 30, 20)]
    for index, prompt in enumerate(prompts):
        wanted = -1 if index == 3 else 2
        fields = {"num_prompt_logprobs": wanted, "max_tokens": 2, "ignore_eos": True}
        engine.submit(OWNER, make_submit(prompt, index, **fields))
    outcomes: dict[int, Outcome] = defaultdict(Outcome)
    while engine.has_work:
        recorder.logits.clear()
        collect(outcomes, engine.step())
        assert len(recorder.logits) <= MAX_SCORED_TOKENS + len(prompts)
    for index, prompt in enumerate(prompts[:3]):
        check(scores_of(outcomes[index]), expected_logprobs(oracle, prompt), prompt, 2)
    assert len(outcomes[3].token_ids) == 2


def test_split_model_scores_as_the_whole_one(tmp_path: Path) -> None:
    """The workers compute the same logit rows, or the gather would hang."""
    oracle = make_oracle("llama", seed=4, num_attention_heads=4, intermediate_size=96)
    files = save_oracle(oracle, tmp_path / "model")
    prompt = random_prompt(70)
    with engine_of(files, 2) as engine:
        outcome = score(engine, prompt, max_tokens=2)
    check(scores_of(outcome), expected_logprobs(oracle, prompt), prompt, 2)


def test_prompt_alone_is_scored_without_an_answer(model: tuple[Oracle, ModelFiles]) -> None:
    """With max_tokens = 0 a prompt may fill the context, and ends with its scores."""
    oracle, files = model
    engine = load_engine(files, max_model_len=64)
    prompt = random_prompt(64)
    outcome = score(engine, prompt, max_tokens=0)
    check(scores_of(outcome), expected_logprobs(oracle, prompt), prompt, 2)
    assert (outcome.token_ids, outcome.finish_reason) == ([], "length")
    with pytest.raises(errors.ContextLengthExceeded):
        engine.submit(OWNER, make_submit(prompt, max_tokens=1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_row_of_a_prompt_fails_its_request_alone(
    model: tuple[Oracle, ModelFiles], value: float
) -> None:
    """The error names request and token; a neighbour in the step is not harmed."""
    _, files = model
    engine = load_engine(files)
    prompt, other = random_prompt(20), random_prompt(12, seed=1)
    expected = score(engine, other, max_tokens=4).token_ids
    recorder = record(engine)
    recorder.spoil = {5: value}
    engine.submit(OWNER, make_submit(prompt, 1, num_prompt_logprobs=0))
    engine.submit(OWNER, make_submit(other, 2, max_tokens=4))
    outcomes = run_to_end(engine)
    error = outcomes[1].error
    assert error is not None
    assert error.code == errors.NonFiniteLogits.code
    assert "request-1" in error.message
    assert "token 6;" in error.message
    assert outcomes[2].token_ids == expected


def test_equal_logits_share_the_better_rank() -> None:
    """A rank counts the tokens that are more likely, not those that come first."""
    scores = score_tokens(torch.tensor([[1.0, 3.0, 3.0, 2.0]] * 3), [2, 3, 0], 0)
    assert scores.ranks == [1, 3, 4]
    assert scores.top_ids == [[], [], []]


def test_scores_end_before_the_first_row_that_is_not_finite() -> None:
    """Also when it is not in the first slice."""
    logits = torch.zeros(50, 4)
    logits[40, 1] = float("nan")
    assert len(score_tokens(logits, [0] * 50, 1).logprobs) == 40
