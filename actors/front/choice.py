"""One answer in the making: tokens in, text, log probabilities and the ending out.

Text is held back while it could be part of a character or of a stop string. With stop strings or
log probabilities tokens are taken one at a time, so that counts and offsets are exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from actors.front.text_models import TextModel
from cortexd.errors import EngineRestarting, Internal
from cortexd.messages.inference import SequenceDelta


class StopFilter(Protocol):
    """Holds text back while it may be the start of a stop string."""

    def push(self, text: str) -> tuple[str, bool]:
        """Return the text that is safe to send, and whether a stop string was met."""

    def flush(self) -> str:
        """Return what was held back, at the end."""


@dataclass(slots=True, frozen=True)
class TokenScore:
    """A token's text, log probability, likely rivals, and where its text starts in the answer."""

    text: str
    logprob: float
    rivals: list[tuple[str, float]]
    offset: int


@dataclass(slots=True)
class ChoiceOutput:
    """What one choice gained since the last output."""

    index: int
    text: str
    scores: list[TokenScore] = field(default_factory=list)
    finish_reason: str | None = None


class Choice:
    """State of one answer. `is_first_answer` marks the one that counts its prompt's cached tokens."""

    def __init__(
        self,
        index: int,
        text_model: TextModel,
        stop_filter: StopFilter | None,
        *,
        wants_scores: bool,
        is_first_answer: bool,
    ) -> None:
        self.index = index
        self.is_first_answer = is_first_answer
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self.was_stopped_by_text = False
        self._text_model = text_model
        self._detokenizer = text_model.detokenizer()
        self._stop_filter = stop_filter
        self._wants_scores = wants_scores
        self._text = ""
        self._text_length = 0
        self._scores: list[TokenScore] = []

    def push(self, delta: SequenceDelta) -> None:
        """Take one step's tokens. Raises: the sequence's own error."""
        if self.finish_reason is not None:
            return
        if delta.error is not None:
            raise delta.error.to_exception()
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        if self._stop_filter is None and not self._wants_scores:
            self.num_tokens += len(delta.token_ids)
            if delta.token_ids:
                self._text += self._detokenizer.push(delta.token_ids)
        else:
            self._push_singly(delta)
        if delta.finish_reason is not None and self.finish_reason is None:
            self._finish(delta.finish_reason)

    def take(self) -> ChoiceOutput | None:
        """Return what is ready to be sent, None when there is nothing."""
        if not self._text and self.finish_reason is None:
            return None
        output = ChoiceOutput(self.index, self._text, self._scores, self.finish_reason)
        self._text = ""
        self._scores = []
        return output

    def _push_singly(self, delta: SequenceDelta) -> None:
        for position, token_id in enumerate(delta.token_ids):
            self.num_tokens += 1
            if self._wants_scores:
                self._scores.append(self._score(token_id, position, delta))
            if self._emit(self._detokenizer.push([token_id])):
                return

    def _emit(self, text: str) -> bool:
        """Add text that may be sent; return True when a stop string ended the answer."""
        self._text_length += len(text)
        if self._stop_filter is None:
            self._text += text
            return False
        safe, is_stopped = self._stop_filter.push(text)
        self._text += safe
        if is_stopped:
            self.was_stopped_by_text = True
            self.finish_reason = "stop"
        return is_stopped

    def _finish(self, reason: str) -> None:
        if reason == "cancelled":
            raise EngineRestarting("the engine dropped this request; try again")
        if reason not in {"stop", "length"}:
            raise Internal(f"the engine ended this request without a cause ({reason})")
        if self._emit(self._detokenizer.flush()):
            return
        if self._stop_filter is not None:
            self._text += self._stop_filter.flush()
        self.finish_reason = reason

    def _score(self, token_id: int, position: int, delta: SequenceDelta) -> TokenScore:
        decode = self._text_model.decode
        rivals: list[tuple[str, float]] = []
        if position < len(delta.top_ids):
            pairs = zip(delta.top_ids[position], delta.top_logprobs[position], strict=True)
            rivals = [(decode([rival]), logprob) for rival, logprob in pairs]
        return TokenScore(
            decode([token_id]), delta.logprobs[position], rivals, offset=self._text_length
        )
