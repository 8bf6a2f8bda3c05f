"""One answer in the making: tokens in, pieces, log probabilities and the ending out.

Text is held back while it could be part of a character, of a marker or of a stop string; stop
strings are looked for in the text for the reader only. With a parser, stop strings or log
probabilities tokens are taken one at a time, so that counts and offsets are exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cortexd.errors import EngineRestarting, Internal
from cortexd.messages.inference import SequenceDelta
from engine.text.answer import Piece, Text, ToolCall, add_piece
from engine.text.stop_strings import StopStrings

if TYPE_CHECKING:
    from actors.front.prompt_part import PromptPart
    from engine.text.answer_parser import AnswerParser
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
    """What one choice gained since the last output. `stop_string` is the one that ended it.

    The first output of a choice holds what is to be told of its prompt.
    """

    index: int
    pieces: list[Piece]
    scores: list[TokenScore] = field(default_factory=list)
    finish_reason: str | None = None
    stop_string: str | None = None
    prompt: PromptPart | None = None

    def extend(self, later: ChoiceOutput) -> None:
        """Add what came after."""
        for piece in later.pieces:
            add_piece(self.pieces, piece)
        self.scores += later.scores
        self.finish_reason = later.finish_reason
        self.stop_string = later.stop_string


class Choice:
    """State of one answer.

    `is_first_answer` marks the one that counts its prompt's cached tokens; `continues_text` an
    answer that goes on with its prompt's text instead of opening a turn; `ends_at_tool_call` one
    that may hold a single call; `call_ending` is the finish reason of one with calls. `parser` is
    None when all of the answer is text. Stop strings do not count before `min_tokens`. Of a prompt
    with a `prompt_part` that comes first; until it is complete, nothing is handed out.
    """

    def __init__(
        self,
        index: int,
        text_model: TextModel,
        stop_strings: StopStrings | None,
        *,
        parser: AnswerParser | None = None,
        wants_scores: bool,
        is_first_answer: bool,
        continues_text: bool,
        ends_at_tool_call: bool = False,
        call_ending: str = "tool_calls",
        min_tokens: int = 0,
        prompt_part: PromptPart | None = None,
    ) -> None:
        self.index = index
        self.is_first_answer = is_first_answer
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.num_reasoning_tokens = 0
        self.finish_reason: str | None = None
        self.was_stopped_here = False
        self._text_model = text_model
        self._detokenizer = text_model.detokenizer(
            shows_markers=parser is not None, continues_text=continues_text
        )
        self._parser = parser
        self._stop_strings = stop_strings
        self._wants_scores = wants_scores
        self._ends_at_tool_call = ends_at_tool_call
        self._call_ending = call_ending
        self._has_tool_call = False
        self._pieces: list[Piece] = []
        self._min_tokens = min_tokens
        self._prompt_part = prompt_part
        self._untold_prompt = prompt_part
        self._text_length = 0 if prompt_part is None else len(prompt_part.echo)
        self._scores: list[TokenScore] = []

    def push(self, delta: SequenceDelta) -> None:
        """Take one step's tokens. Raises: the sequence's own error."""
        if self.finish_reason is not None:
            return
        if delta.error is not None:
            raise delta.error.to_exception()
        if delta.prompt_scores is not None and self._prompt_part is not None:
            self._prompt_part.push(delta.prompt_scores)
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        if self._parser is None and self._stop_strings is None and not self._wants_scores:
            self.num_tokens += len(delta.token_ids)
            if delta.token_ids:
                self._add_text(self._detokenizer.push(delta.token_ids))
        else:
            self._push_singly(delta)
        if delta.finish_reason is not None and self.finish_reason is None:
            self._finish(delta.finish_reason)

    def take(self) -> ChoiceOutput | None:
        """Return what is ready to be sent, None when there is nothing."""
        prompt = self._untold_prompt
        if prompt is not None and not prompt.is_complete:
            return None
        if prompt is None and not self._pieces and self.finish_reason is None:
            return None
        self._untold_prompt = None
        stop = self._stop_strings.stop if self._stop_strings is not None else None
        output = ChoiceOutput(
            self.index, self._pieces, self._scores, self.finish_reason, stop, prompt
        )
        self._pieces = []
        self._scores = []
        return output

    def _push_singly(self, delta: SequenceDelta) -> None:
        for position, token_id in enumerate(delta.token_ids):
            self.num_tokens += 1
            if self._wants_scores:
                self._scores.append(self._score(token_id, position, delta))
            if self._push_token(token_id):
                return

    def _push_token(self, token_id: int) -> bool:
        """Add what one token completes; return True when it ended the answer."""
        text = self._detokenizer.push([token_id])
        self._text_length += len(text)
        if self._parser is None:
            return self._emit_text(text)
        # Read before and after, so that the markers count with what they enclose.
        was_reasoning = self._parser.is_reasoning
        is_ended = any(map(self._emit, self._parser.push(text)))
        self.num_reasoning_tokens += was_reasoning or self._parser.is_reasoning
        return is_ended

    def _emit(self, piece: Piece) -> bool:
        """Add a piece that may be sent; return True when it ended the answer."""
        if isinstance(piece, Text):
            return self._emit_text(piece.text)
        self._release_held()
        add_piece(self._pieces, piece)
        self._has_tool_call = self._has_tool_call or isinstance(piece, ToolCall)
        if self._has_tool_call and self._ends_at_tool_call:
            self._stop_here(self._call_ending)
            return True
        return False

    def _emit_text(self, text: str) -> bool:
        if self._stop_strings is None or self.num_tokens <= self._min_tokens:
            self._add_text(text)
            return False
        safe, is_stopped = self._stop_strings.push(text)
        self._add_text(safe)
        if is_stopped:
            self._stop_here("stop")
        return is_stopped

    def _release_held(self) -> None:
        """Send what was held as a possible stop string: it cannot go on past this point."""
        if self._stop_strings is not None:
            self._add_text(self._stop_strings.flush())

    def _add_text(self, text: str) -> None:
        if text:
            add_piece(self._pieces, Text(text))

    def _stop_here(self, reason: str) -> None:
        self.was_stopped_here = True
        self.finish_reason = reason

    def _finish(self, reason: str) -> None:
        if reason == "cancelled":
            raise EngineRestarting("the engine dropped this request; try again")
        if reason not in {"stop", "length"}:
            raise Internal(f"the engine ended this request without a cause ({reason})")
        prompt = self._prompt_part
        if self.is_first_answer and prompt is not None and not prompt.is_complete:
            raise Internal(f"the engine ended this request without its scores ({prompt!r})")
        if self._flush():
            return
        self._release_held()
        self.finish_reason = reason
        if reason == "stop" and self._has_tool_call:
            self.finish_reason = self._call_ending

    def _flush(self) -> bool:
        """Add what detokenizer and parser held back; return True when that ended the answer."""
        rest = self._detokenizer.flush()
        if self._parser is None:
            return self._emit_text(rest)
        pieces = self._parser.push(rest) + self._parser.flush()
        return any(map(self._emit, pieces))

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
