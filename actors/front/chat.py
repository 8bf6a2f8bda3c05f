"""The shapes of `/v1/chat/completions`: chunks, and the whole answer."""

from __future__ import annotations

from collections import Counter

import msgspec

from actors.front.choice import ChoiceOutput, TokenScore
from actors.front.dialect import COMMENT, DONE, Answer, ChunkEncoder, data_event
from actors.front.error_response import envelope
from actors.front.request import InferenceRequest
from actors.front.validate import parse_chat
from cortexd.errors import CortexError
from cortexd.openai import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    FunctionCall,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    TopLogprob,
    Usage,
)
from engine.text.answer import Piece, Reasoning, Text

_SPLIT_AT = "\x00"


class ChatDialect:
    """`/v1/chat/completions`."""

    route = "/v1/chat/completions"
    id_prefix = "chatcmpl-"

    def parse(self, body: bytes) -> InferenceRequest:
        """Return the checked request."""
        return parse_chat(body)

    def encoder(self, answer: Answer) -> ChunkEncoder:
        """Return a fresh stream encoder."""
        return ChatEncoder(answer)

    def response(self, answer: Answer, outputs: list[ChoiceOutput], usage: Usage) -> bytes:
        """Return the whole answer."""
        part = outputs[0].prompt
        maps = None if part is None else part.logprob_maps()
        return msgspec.json.encode(
            ChatCompletion(
                id=answer.id,
                created=answer.created,
                model=answer.model,
                system_fingerprint=answer.fingerprint,
                choices=[
                    ChatChoice(
                        index=output.index,
                        message=_message(output.pieces),
                        logprobs=_logprobs(output.scores),
                        finish_reason=output.finish_reason,
                    )
                    for output in outputs
                ],
                usage=usage,
                prompt_logprobs=msgspec.UNSET if maps is None else maps,
            )
        )


class ChatEncoder:
    """Encode one chat stream; each choice's first event carries the role."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._has_role: set[int] = set()
        self._num_calls: Counter[int] = Counter()
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def chunk(self, output: ChoiceOutput) -> bytes:
        """Return role, content and finish events as far as the output has them."""
        events = self._role(output.index)
        logprobs = _logprobs(output.scores)
        for piece in output.pieces:
            if isinstance(piece, Text) and logprobs is None:
                head, tail = self._frame(output.index)
                events += head + msgspec.json.encode(piece.text) + tail
            else:
                delta = self._delta(output.index, piece)
                events += self._event(output.index, delta, logprobs=logprobs)
                logprobs = None  # once: they are those of the whole output
        if output.finish_reason is not None:
            events += self._event(
                output.index,
                ChatDelta(),
                logprobs=logprobs,
                finish_reason=output.finish_reason,
            )
        return events

    def comment(self) -> bytes:
        """Return a comment line."""
        return COMMENT

    def keepalive(self) -> bytes:
        """Return the role event when it is still due, else an empty delta."""
        return self._role(0) or self._event(0, ChatDelta())

    def end(self, usage: Usage) -> bytes:
        """Return the usage event, if it is wanted, and the end mark."""
        counts = data_event(self._document([], usage)) if self._answer.include_usage else b""
        return counts + DONE

    def error(self, error: CortexError) -> bytes:
        """Return the error event; no end mark follows, since the answer is not whole."""
        return b"data: " + envelope(error) + b"\n\n"

    def _delta(self, index: int, piece: Piece) -> ChatDelta:
        if isinstance(piece, Text):
            return ChatDelta(content=piece.text)
        if isinstance(piece, Reasoning):
            return ChatDelta(reasoning_content=piece.text)
        position = self._num_calls[index]
        self._num_calls[index] += 1
        function = FunctionCall(piece.name, piece.arguments)
        call = ToolCallDelta(index=position, id=_call_id(piece.key), function=function)
        return ChatDelta(tool_calls=[call])

    def _role(self, index: int) -> bytes:
        if index in self._has_role:
            return b""
        self._has_role.add(index)
        return self._event(index, ChatDelta(role="assistant", content=""))

    def _event(
        self,
        index: int,
        delta: ChatDelta,
        *,
        logprobs: ChatLogprobs | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        choice = ChatChunkChoice(
            index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason
        )
        return data_event(self._document([choice]))

    def _document(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatChunk:
        answer = self._answer
        return ChatChunk(
            id=answer.id,
            created=answer.created,
            model=answer.model,
            system_fingerprint=answer.fingerprint,
            choices=choices,
            usage=usage,
        )

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        """Return what stands before and after the text in a text event: encoded once a stream."""
        frame = self._frames.get(index)
        if frame is None:
            marked = self._event(index, ChatDelta(content=_SPLIT_AT))
            head, _, tail = marked.rpartition(msgspec.json.encode(_SPLIT_AT))
            frame = self._frames[index] = (head, tail)
        return frame


def _message(pieces: list[Piece]) -> ChatMessage:
    """Return the whole message: its content is null when the model only called tools."""
    content = "".join(piece.text for piece in pieces if isinstance(piece, Text))
    reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
    calls = [
        ToolCall(id=_call_id(piece.key), function=FunctionCall(piece.name, piece.arguments))
        for piece in pieces
        if not isinstance(piece, Text | Reasoning)
    ]
    return ChatMessage(
        content=None if calls and not content else content,
        reasoning_content=reasoning or msgspec.UNSET,
        tool_calls=calls or msgspec.UNSET,
    )


def _call_id(key: str) -> str:
    return f"call_{key}"


def _logprobs(scores: list[TokenScore]) -> ChatLogprobs | None:
    if not scores:
        return None
    return ChatLogprobs(
        content=[
            TokenLogprob(
                token=score.chosen.text,
                logprob=score.chosen.logprob,
                bytes=list(score.chosen.data),
                top_logprobs=[
                    TopLogprob(token=rival.text, logprob=rival.logprob, bytes=list(rival.data))
                    for rival in score.rivals
                ],
            )
            for score in scores
        ]
    )
