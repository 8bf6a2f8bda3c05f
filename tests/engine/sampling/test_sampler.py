"""The sampler, each setting against a simple computation of its own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.sampling.sampler import (
    TOP_P_CANDIDATES,
    SampledToken,
    Sampler,
    apply_penalties,
    truncate,
)
from engine.scheduling.sequence import Sequence
from tests.engine.doubles import make_sequence, make_submit

VOCAB_SIZE = 50


def random_logits(seed: int = 0, size: int = VOCAB_SIZE) -> Tensor:
    """Return float32 logits of a clear shape."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def sample(logits: Tensor, **fields: Any) -> SampledToken:
    """Sample one row for a sequence of prompt [1, 2, 3] and no output."""
    sequence = make_sequence([1, 2, 3], **fields)
    return Sampler().sample(logits.unsqueeze(0), [sequence])[0]


def draw_many(logits: Tensor, count: int = 4000, **fields: Any) -> list[float]:
    """Return the share of each token over `count` seeds."""
    sequences = [make_sequence([1], seed=seed, temperature=1.0, **fields) for seed in range(count)]
    sampler = Sampler()
    tokens = [sampler.sample(logits.unsqueeze(0), [one])[0].token_id for one in sequences]
    return [tokens.count(token_id) / count for token_id in range(len(logits))]


def allowed(logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    """Return the ids that `truncate` leaves."""
    probabilities, ids = truncate(logits, top_k, top_p, min_p)
    if ids is None:
        return set(probabilities.nonzero().flatten().tolist())
    return set(ids.tolist())


def plain_probabilities(logits: Tensor) -> list[float]:
    """Return the softmax, computed in Python floats."""
    weights = [math.exp(value) for value in logits.tolist()]
    return [weight / sum(weights) for weight in weights]


def test_temperature_zero_takes_the_most_likely() -> None:
    """Greedy rows take the maximum, also when other settings keep them off the fast path."""
    logits = random_logits()
    best = int(logits.argmax())
    assert sample(logits).token_id == best
    assert sample(logits, num_logprobs=0, top_k=3, top_p=0.1).token_id == best


def test_draw_frequencies_follow_the_distribution() -> None:
    """Over many seeds, tokens come as often as their probability says."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    for share, expected in zip(draw_many(logits), plain_probabilities(logits), strict=True):
        assert abs(share - expected) < 0.03


def test_temperature_flattens_and_sharpens() -> None:
    """Logits are divided by the temperature."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    sequences = [make_sequence([1], seed=seed, temperature=2.0) for seed in range(4000)]
    sampler = Sampler()
    tokens = [sampler.sample(logits.unsqueeze(0), [one])[0].token_id for one in sequences]
    for token_id, expected in enumerate(plain_probabilities(logits / 2)):
        assert abs(tokens.count(token_id) / 4000 - expected) < 0.03


@pytest.mark.parametrize("top_k", [1, 5, VOCAB_SIZE, VOCAB_SIZE + 1])
def test_top_k_leaves_the_k_most_likely(top_k: int) -> None:
    """Ids outside the k largest logits are never drawn."""
    logits = random_logits(1)
    ranked = sorted(range(VOCAB_SIZE), key=lambda token_id: -float(logits[token_id]))
    assert allowed(logits, top_k=top_k) == set(ranked[:top_k])


@pytest.mark.parametrize("top_p", [0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("size", [VOCAB_SIZE, TOP_P_CANDIDATES[-1] + 500])
def test_top_p_leaves_the_smallest_set_of_that_mass(top_p: float, size: int) -> None:
    """The set is the shortest head of the ranking that holds the mass; it is never empty."""
    logits = random_logits(2, size)
    probabilities = plain_probabilities(logits)
    expected: set[int] = set()
    mass = 0.0
    for token_id in sorted(range(size), key=lambda token_id: -probabilities[token_id]):
        if mass >= top_p:
            break
        expected.add(token_id)
        mass += probabilities[token_id]
    assert allowed(logits, top_p=top_p) == expected


def test_top_p_of_a_flat_distribution_sorts_the_whole_vocabulary() -> None:
    """More candidates than the short list holds: the full sort takes over."""
    logits = torch.zeros(3 * TOP_P_CANDIDATES[-1])
    assert len(allowed(logits, top_p=0.9)) == pytest.approx(2.7 * TOP_P_CANDIDATES[-1], abs=2)


@pytest.mark.parametrize("min_p", [0.01, 0.2, 1.0])
@pytest.mark.parametrize("top_k", [0, 10])
def test_min_p_drops_what_is_far_below_the_best(min_p: float, top_k: int) -> None:
    """A token needs at least min_p times the best one's probability."""
    logits = random_logits(3)
    probabilities = plain_probabilities(logits)
    kept = {i for i, value in enumerate(probabilities) if value >= min_p * max(probabilities)}
    ranked = sorted(range(VOCAB_SIZE), key=lambda token_id: -probabilities[token_id])
    expected = kept & set(ranked[: top_k or VOCAB_SIZE])
    assert allowed(logits, min_p=min_p, top_k=top_k) == expected


def test_top_p_counts_mass_after_top_k() -> None:
    """Top-k renormalises before top-p is applied."""
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    assert allowed(logits, top_p=0.6) == {0, 1}
    assert allowed(logits, top_k=2, top_p=0.56) == {0}  # 0.4 of 0.7 is 0.571


def test_truncated_draws_follow_the_renormalised_distribution() -> None:
    """What remains keeps its proportions."""
    logits = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    shares = draw_many(logits, top_k=2)
    assert shares[:2] == [0.0, 0.0]
    assert abs(shares[3] - 4 / 7) < 0.03


def test_penalties_equal_a_loop_over_tokens() -> None:
    """Repetition over prompt and output; presence and frequency over the output."""
    logits = random_logits(4)
    prompt, output = [1, 2, 3, 3], [4, 4, 4, 2]
    submit = make_submit(
        prompt, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25
    )
    ids = sorted(set(prompt + output))
    counts = torch.tensor([float(output.count(token_id)) for token_id in ids])
    expected = logits.tolist()
    for token_id in range(VOCAB_SIZE):
        value = expected[token_id]
        if token_id in prompt + output:
            value = value / 1.3 if value > 0 else value * 1.3
        value -= 0.25 * output.count(token_id)
        value -= 0.5 * (token_id in output)
        expected[token_id] = value
    got = apply_penalties(logits, torch.tensor(ids), counts, submit)
    assert got.tolist() == pytest.approx(expected, abs=1e-5)


def test_counts_grow_with_the_sequence_and_survive_preemption() -> None:
    """Each step counts only new tokens; the result equals counting all at once."""
    logits = torch.zeros(VOCAB_SIZE)
    logits[7] = 1.0
    logits[8] = 0.9
    sequence = make_sequence([1, 2], frequency_penalty=0.3)
    sampler = Sampler()
    tokens: list[int] = []
    for _ in range(4):
        token_id = sampler.sample(logits.unsqueeze(0), [sequence])[0].token_id
        assert token_id is not None
        sequence.token_ids.append(token_id)
        tokens.append(token_id)
    assert tokens == [7, 8, 7, 8]
    again = make_sequence([1, 2], tokens, frequency_penalty=0.3)
    fresh = Sampler().sample(logits.unsqueeze(0), [again])
    assert fresh == sampler.sample(logits.unsqueeze(0), [sequence])


def test_logit_bias_is_added_before_the_choice() -> None:
    """A bias lifts a token over the best one, or bans it."""
    logits = random_logits(5)
    best = int(logits.argmax())
    assert sample(logits, logit_bias={9: 100.0}).token_id == 9
    assert sample(logits, logit_bias={best: -100.0}).token_id != best


def test_min_tokens_keeps_end_tokens_out_until_reached() -> None:
    """End tokens cannot be chosen while too few tokens are generated."""
    logits = random_logits(6)
    best = int(logits.argmax())
    sampler = Sampler()
    early = make_sequence([1], [2], min_tokens=2)
    late = make_sequence([1], [2, 3], min_tokens=2)
    for sequence in (early, late):
        sequence.stop_token_ids = frozenset({best})
    rows = sampler.sample(torch.stack([logits, logits]), [early, late])
    assert rows[0].token_id != best
    assert rows[1].token_id == best


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    """Temperature, bias and penalties do not change the reported log-probabilities."""
    logits = random_logits(7)
    expected = [math.log(value) for value in plain_probabilities(logits)]
    got = sample(
        logits, num_logprobs=3, temperature=0.5, logit_bias={11: 50.0}, repetition_penalty=2.0
    )
    assert got.token_id == 11
    assert got.logprob == pytest.approx(expected[11], abs=1e-4)
    ranked = sorted(range(VOCAB_SIZE), key=lambda token_id: -expected[token_id])[:3]
    assert got.top_ids == ranked
    assert got.top_logprobs == pytest.approx([expected[i] for i in ranked], abs=1e-4)
    alone = sample(logits, num_logprobs=0)
    assert (alone.top_ids, alone.top_logprobs) == ([], [])
    assert alone.logprob == pytest.approx(max(expected), abs=1e-4)


def test_same_seed_gives_the_same_token_whatever_the_batch() -> None:
    """A row's draw depends on its own seed and position only."""
    logits = torch.stack([random_logits(seed) for seed in range(8)])
    batch = [make_sequence([1], seed=seed, temperature=1.0) for seed in range(8)]
    sampler = Sampler()
    together = sampler.sample(logits, batch)
    alone = [sampler.sample(logits[i : i + 1], batch[i : i + 1])[0] for i in range(8)]
    backwards = sampler.sample(logits.flip(0), batch[::-1])[::-1]
    assert together == alone == backwards


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_non_finite_row_yields_no_token_and_spares_the_others(
    value: float, temperature: float
) -> None:
    """One bad value anywhere in a row marks that row alone."""
    logits = torch.stack([random_logits(seed) for seed in range(3)])
    logits[1, 17] = value
    batch = [make_sequence([1], seed=seed, temperature=temperature) for seed in range(3)]
    got = Sampler().sample(logits, batch)
    assert [row.token_id is None for row in got] == [False, True, False]


def test_bfloat16_logits_are_sampled_in_float32() -> None:
    """Half-precision logits are widened first."""
    logits = random_logits(8).bfloat16()
    assert sample(logits, num_logprobs=0).logprob == pytest.approx(
        math.log(max(plain_probabilities(logits.float()))), abs=1e-5
    )


def test_bad_word_is_not_completed_by_the_output() -> None:
    """The last token of a word is out of the question behind its beginning, and only there."""
    logits = random_logits()
    best, second = logits.topk(2).indices.tolist()
    assert sample(logits, bad_words=[[best]]).token_id == second
    assert sample(logits, bad_words=[[4, best]]).token_id == best
    assert sample(logits, bad_words=[[3, best]]).token_id == best, "3 is the prompt's"
    for output, expected in (([9, 4], second), ([4, 9], best), ([4], second), ([], best)):
        sequence = make_sequence([1], output, bad_words=[[4, best]])
        assert Sampler().sample(logits.unsqueeze(0), [sequence])[0].token_id == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_mask_leaves_only_what_a_grammar_allows(temperature: float) -> None:
    """The masked row chooses among the allowed tokens, its neighbour among all."""
    logits = random_logits()
    best = int(logits.argmax())
    masked, free = (make_sequence([1], seed=seed, temperature=temperature) for seed in (1, 2))
    expected = Sampler().sample(logits.unsqueeze(0), [free])[0].token_id
    sampler = Sampler()
    seen: list[int] = []

    def mask(sequence: Sequence) -> Tensor:
        seen.append(len(sequence.token_ids))
        allowed = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
        allowed[[(best + 1) % VOCAB_SIZE, (best + 2) % VOCAB_SIZE]] = True
        return allowed

    sampler.constrain(masked, mask)
    tokens = sampler.sample(torch.stack([logits, logits]), [masked, free])
    assert tokens[0].token_id in {(best + 1) % VOCAB_SIZE, (best + 2) % VOCAB_SIZE}
    assert tokens[1].token_id == expected
    assert seen == [1]
    sampler.release(masked)
    sampler.sample(logits.unsqueeze(0), [masked])
    assert seen == [1]


def test_row_of_which_nothing_is_allowed_yields_no_token() -> None:
    """A grammar at its wits' end, or too many bad words, fail the one request."""
    sequence = make_sequence([1], temperature=1.0)
    sampler = Sampler()
    sampler.constrain(sequence, lambda _: torch.zeros(VOCAB_SIZE, dtype=torch.bool))
    assert sampler.sample(random_logits().unsqueeze(0), [sequence])[0].token_id is None
    assert sample(random_logits(), bad_words=[[token] for token in range(50)]).token_id is None


def test_only_allowed_tokens_are_drawn() -> None:
    """Greedy and drawn tokens are of the list; one that min_tokens bans too leaves nothing."""
    logits = random_logits()
    order = logits.argsort(descending=True).tolist()
    assert sample(logits, allowed_token_ids=order[2:5]).token_id == order[2]
    drawn = {
        sample(logits, allowed_token_ids=order[2:5], temperature=1.0, seed=seed).token_id
        for seed in range(40)
    }
    assert drawn == set(order[2:5])
    sequence = make_sequence([1], allowed_token_ids=[order[0]], min_tokens=1)
    sequence.stop_token_ids = frozenset([order[0]])
    (result,) = Sampler().sample(logits[None], [sequence])
    assert (result.token_id, result.is_finite) == (None, True)
