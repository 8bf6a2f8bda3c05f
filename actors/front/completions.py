"""The shapes of `/v1/completions`: chunks, and the whole answer."""

from __future__ import annotations

import msgspec

from actors.front.choice import ChoiceOutput, TokenScore
from actors.front.dialect import COMMENT, DONE, Answer, ChunkEncoder, data_event
from actors.front.error_response import envelope
from actors.front.request import InferenceRequest
from actors.front.validate import parse_completion
from cortexd.errors import CortexError
from cortexd.openai import Completion, CompletionChoice, CompletionLogprobs, Usage
from engine.text.answer import Text

_SPLIT_AT = "\x00"


class CompletionDialect:
    """`/v1/completions`."""

    route = "/v1/completions"
    id_prefix = "cmpl-"

    def parse(self, body: bytes) -> InferenceRequest:
        """Return the checked request."""
        return parse_completion(body)

    def encoder(self, answer: Answer) -> ChunkEncoder:
        """Return a fresh stream encoder."""
        return CompletionEncoder(answer)

    def response(self, answer: Answer, outputs: list[ChoiceOutput], usage: Usage) -> bytes:
        """Return the whole answer."""
        choices = [_whole_choice(output) for output in outputs]
        return msgspec.json.encode(_document(answer, choices, usage))


class CompletionEncoder:
    """Encode one legacy stream."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def chunk(self, output: ChoiceOutput) -> bytes:
        """Return one event with the text, its scores and the finish reason."""
        if output.scores or output.finish_reason is not None or output.prompt is not None:
            return self._event(_choice(output))
        head, tail = self._frame(output.index)
        return head + msgspec.json.encode(_text(output)) + tail

    def comment(self) -> bytes:
        """Return a comment line."""
        return COMMENT

    def keepalive(self) -> bytes:
        """Return an event with empty text."""
        return self._event(CompletionChoice(index=0, text=""))

    def end(self, usage: Usage) -> bytes:
        """Return the usage event, if it is wanted, and the end mark."""
        counts = b""
        if self._answer.include_usage:
            counts = data_event(_document(self._answer, [], usage))
        return counts + DONE

    def error(self, error: CortexError) -> bytes:
        """Return the error event; no end mark follows, since the answer is not whole."""
        return b"data: " + envelope(error) + b"\n\n"

    def _event(self, choice: CompletionChoice) -> bytes:
        return data_event(_document(self._answer, [choice]))

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        """Return what stands before and after the text in a text event: encoded once a stream."""
        frame = self._frames.get(index)
        if frame is None:
            marked = self._event(CompletionChoice(index=index, text=_SPLIT_AT))
            head, _, tail = marked.rpartition(msgspec.json.encode(_SPLIT_AT))
            frame = self._frames[index] = (head, tail)
        return frame


def _document(
    answer: Answer, choices: list[CompletionChoice], usage: Usage | None = None
) -> Completion:
    return Completion(
        id=answer.id,
        created=answer.created,
        model=answer.model,
        system_fingerprint=answer.fingerprint,
        choices=choices,
        usage=usage,
    )


def _whole_choice(output: ChoiceOutput) -> CompletionChoice:
    maps = None if output.prompt is None else output.prompt.logprob_maps()
    choice = _choice(output)
    return choice if maps is None else msgspec.structs.replace(choice, prompt_logprobs=maps)


def _choice(output: ChoiceOutput) -> CompletionChoice:
    logprobs = _logprobs(output.scores)
    text = _text(output)
    if output.prompt is not None:
        logprobs = _joined(output.prompt.echo_logprobs(), logprobs)
        text = output.prompt.echo + text
    return CompletionChoice(
        index=output.index,
        text=text,
        logprobs=logprobs,
        finish_reason=output.finish_reason,
    )


def _joined(
    first: CompletionLogprobs | None, second: CompletionLogprobs | None
) -> CompletionLogprobs | None:
    if first is None or second is None:
        return first or second
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )


def _text(output: ChoiceOutput) -> str:
    return "".join(piece.text for piece in output.pieces if isinstance(piece, Text))


def _logprobs(scores: list[TokenScore]) -> CompletionLogprobs | None:
    if not scores:
        return None
    return CompletionLogprobs(
        tokens=[score.chosen.text for score in scores],
        token_logprobs=[score.chosen.logprob for score in scores],
        top_logprobs=[
            {token.text: token.logprob for token in [*score.rivals, score.chosen]}
            for score in scores
        ],
        text_offset=[score.offset for score in scores],
    )
