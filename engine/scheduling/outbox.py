"""What a step has to tell the owners of its sequences, gathered until the leader takes it."""

from __future__ import annotations

from cortexd import errors
from cortexd.messages.inference import PromptScores, SequenceDelta
from engine.sampling.sampler import SampledToken
from engine.scheduling.sequence import Sequence


class Outbox:
    """Deltas by owner, in the order in which they happened."""

    def __init__(self) -> None:
        self._deltas: dict[str, list[SequenceDelta]] = {}

    def __bool__(self) -> bool:
        return bool(self._deltas)

    def take(self) -> dict[str, list[SequenceDelta]]:
        """Return everything and start anew."""
        deltas, self._deltas = self._deltas, {}
        return deltas

    def drop_owner(self, owner: str) -> None:
        """Forget what was meant for an owner that is gone."""
        self._deltas.pop(owner, None)

    def add_progress(self, sequence: Sequence, scores: PromptScores | None = None) -> None:
        """Tell that a prompt is being prefilled, and the scores of its next tokens."""
        delta = SequenceDelta(
            sequence.sequence_id,
            [],
            num_prompt_tokens=sequence.num_prompt_tokens,
            prompt_scores=scores,
        )
        self._add(sequence, delta)

    def add_token(
        self, sequence: Sequence, sampled: SampledToken, finish_reason: str | None
    ) -> None:
        """Tell a token that is already appended to the sequence."""
        is_first = sequence.num_output_tokens == 1
        has_logprobs = sampled.logprob is not None
        delta = SequenceDelta(
            sequence.sequence_id,
            sequence.token_ids[-1:],
            finish_reason=finish_reason,
            logprobs=[sampled.logprob] if sampled.logprob is not None else [],
            top_ids=[sampled.top_ids] if has_logprobs else [],
            top_logprobs=[sampled.top_logprobs] if has_logprobs else [],
            num_prompt_tokens=sequence.num_prompt_tokens if is_first else 0,
            num_cached_tokens=sequence.num_cached_tokens if is_first else 0,
        )
        self._add(sequence, delta)

    def add_end(
        self, sequence: Sequence, finish_reason: str, error: errors.CortexError | None = None
    ) -> None:
        """Tell an ending that brings no token."""
        delta = SequenceDelta(
            sequence.sequence_id,
            [],
            finish_reason=finish_reason,
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_cached_tokens=sequence.num_cached_tokens,
            error=None if error is None else error.to_info(),
        )
        self._add(sequence, delta)

    def _add(self, sequence: Sequence, delta: SequenceDelta) -> None:
        self._deltas.setdefault(sequence.owner, []).append(delta)
