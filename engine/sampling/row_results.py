"""What a step's logits say of each row: scores of prompt tokens, the next token, or an error.

Called by the engine after the forward pass. Stateless but for the sampler it is handed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from cortexd import errors
from cortexd.messages.inference import PromptScores
from engine.sampling.prompt_scores import score_tokens
from engine.sampling.sampler import SampledToken, Sampler
from engine.scheduling.sequence import Sequence
from engine.scheduling.step_plan import PlannedRow


@dataclass(frozen=True, slots=True)
class RowResult:
    """Scores of prompt tokens, a token, both or neither."""

    scores: PromptScores | None
    token: SampledToken | None


def read_results(rows: list[PlannedRow], logits: Tensor, sampler: Sampler) -> list[RowResult]:
    """Return each row's result from the logits (num_logits of all rows, vocab_size)."""
    ends = list(accumulate(row.num_logits for row in rows))
    scores = [
        _score(row, logits[end - row.num_logits : end]) if row.num_scored else None
        for row, end in zip(rows, ends, strict=True)
    ]
    sampling = [row.sequence for row in rows if row.samples]
    if len(sampling) < len(logits):
        logits = logits[[end - 1 for row, end in zip(rows, ends, strict=True) if row.samples]]
    tokens = iter(sampler.sample(logits, sampling) if sampling else [])
    return [
        RowResult(score, next(tokens) if row.samples else None)
        for row, score in zip(rows, scores, strict=True)
    ]


def not_finite(sequence: Sequence, index: int) -> errors.CortexError:
    """Return the error of a sequence whose logits for token `index` cannot be used."""
    return errors.NonFiniteLogits(
        f"request {sequence.submit.request_id}: the model's logits held NaN or infinity at token "
        f"{index}; only this request failed"
    )


def nothing_allowed(sequence: Sequence) -> errors.CortexError:
    """Return the error of a sequence whose own conditions exclude each other."""
    return errors.InvalidValue(
        f"request {sequence.submit.request_id}: allowed_token_ids, bad_words, min_tokens and the "
        f"wanted grammar leave no token for place {len(sequence.token_ids)}; allow more"
    )


def _score(row: PlannedRow, logits: Tensor) -> PromptScores:
    sequence = row.sequence
    first = max(sequence.num_scored, row.start) + 1
    token_ids = sequence.token_ids[first : first + row.num_scored]
    return score_tokens(logits, token_ids, sequence.submit.num_prompt_logprobs)
