"""The shapes of `/v1/chat/completions`: chunks, and the whole answer."""

from __future__ import annotations

import msgspec

from actors.front.choice import ChoiceOutput, TokenScore
from actors.front.dialect import Answer, ChunkEncoder, data_event
from actors.front.request import InferenceRequest
from actors.front.validate import parse_chat
from cortexd.openai import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    TokenLogprob,
    TopLogprob,
    Usage,
)

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
        return msgspec.json.encode(
            ChatCompletion(
                id=answer.id,
                created=answer.created,
                model=answer.model,
                system_fingerprint=answer.fingerprint,
                choices=[
                    ChatChoice(
                        index=output.index,
                        message=ChatMessage(content=output.text),
                        logprobs=_logprobs(output.scores),
                        finish_reason=output.finish_reason,
                    )
                    for output in outputs
                ],
                usage=usage,
            )
        )


class ChatEncoder:
    """Encode one chat stream; each choice's first event carries the role."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._has_role: set[int] = set()
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def chunk(self, output: ChoiceOutput) -> bytes:
        """Return role, text and finish events as far as the output has them."""
        events = self._role(output.index)
        if output.scores:
            delta = ChatDelta(content=output.text)
            events += self._event(output.index, delta, logprobs=_logprobs(output.scores))
        elif output.text:
            head, tail = self._frame(output.index)
            events += head + msgspec.json.encode(output.text) + tail
        if output.finish_reason is not None:
            events += self._event(output.index, ChatDelta(), finish_reason=output.finish_reason)
        return events

    def keepalive(self) -> bytes:
        """Return the role event when it is still due, else an empty delta."""
        return self._role(0) or self._event(0, ChatDelta())

    def usage(self, usage: Usage) -> bytes:
        """Return the usage event."""
        return data_event(self._document([], usage))

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
