"""One answer in the making: tokens in, text, log probabilities and the ending out.

Text is held back while it could be part of a character or of a stop string. With stop strings or
log probabilities tokens are taken one at a time, so that counts and offsets are exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cortexd.errors import EngineRestarting, Internal
from cortexd.messages.inference import SequenceDelta
from engine.text.stop_strings import StopStrings

if TYPE_CHECKING:
    from engine.text.text_model import TextModel


@dataclass(slots=True, frozen=True)
class ScoredToken:
    """One token as text and bytes, with its log probability."""

    text: str
    data: bytes
    logprob: float


@dataclass(slots=True, frozen=True)
class TokenScore:
    """The chosen token, its likely rivals, and where its text starts in the answer."""

    chosen: ScoredToken
    rivals: list[ScoredToken]
    offset: int


@dataclass(slots=True)
class ChoiceOutput:
    """What one choice gained since the last output."""

    index: int
    text: str
    scores: list[TokenScore] = field(default_factory=list)
    finish_reason: str | None = None


class Choice:
    """State of one answer.

    `is_first_answer` marks the one that counts its prompt's cached tokens; `continues_text` an
    answer that goes on with its prompt's text instead of opening a turn.
    """

    def __init__(
        self,
        index: int,
        text_model: TextModel,
        stop_strings: StopStrings | None,
        *,
        wants_scores: bool,
        is_first_answer: bool,
        continues_text: bool,
    ) -> None:
        self.index = index
        self.is_first_answer = is_first_answer
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self.was_stopped_by_text = False
        self._text_model = text_model
        self._detokenizer = text_model.detokenizer(continues_text=continues_text)
        self._stop_strings = stop_strings
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
        if self._stop_strings is None and not self._wants_scores:
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
        if self._stop_strings is None:
            self._text += text
            return False
        safe, is_stopped = self._stop_strings.push(text)
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
        if self._stop_strings is not None:
            self._text += self._stop_strings.flush()
        self.finish_reason = reason

    def _score(self, token_id: int, position: int, delta: SequenceDelta) -> TokenScore:
        rivals: list[ScoredToken] = []
        if position < len(delta.top_ids):
            pairs = zip(delta.top_ids[position], delta.top_logprobs[position], strict=True)
            rivals = [self._scored(rival, logprob) for rival, logprob in pairs]
        chosen = self._scored(token_id, delta.logprobs[position])
        return TokenScore(chosen, rivals, offset=self._text_length)

    def _scored(self, token_id: int, logprob: float) -> ScoredToken:
        model = self._text_model
        return ScoredToken(model.decode([token_id]), model.token_bytes(token_id), logprob)
