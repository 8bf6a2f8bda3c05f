"""The shapes of `/v1/messages`: stream events, and the whole answer.

An answer is a list of blocks in the order in which the model wrote their pieces; the stream opens,
fills and closes the very same blocks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

import msgspec

from actors.front.choice import ChoiceOutput
from actors.front.decode import decode_body
from actors.front.dialect import Answer, ChunkEncoder
from actors.front.message_blocks import (
    MessageBlocks,
    event_bytes,
    stop_of,
    thinking_block,
    tool_id,
)
from actors.front.request import InferenceRequest
from actors.front.structure import schema_rule
from actors.front.validate import check_chat
from cortexd.anthropic import (
    ContentBlock,
    CountTokensRequest,
    Message,
    MessageDelta,
    MessagesRequest,
    MessageStart,
    MessageStop,
    MessageUsage,
    Ping,
    Stop,
    TextBlock,
    ToolUseBlock,
    error_document,
    usage_of,
)
from cortexd.errors import CortexError
from cortexd.openai import Usage
from cortexd.translate import to_chat_request
from engine.text.answer import Piece, Reasoning, Text, ToolCall


class MessagesDialect:
    """`/v1/messages`."""

    route = "/v1/messages"
    id_prefix = "msg_"

    def parse(self, body: bytes) -> InferenceRequest:
        """Return the checked request."""
        return parse_messages(body, MessagesRequest)

    def encoder(self, answer: Answer) -> ChunkEncoder:
        """Return a fresh stream encoder."""
        return MessagesEncoder(answer)

    def response(self, answer: Answer, outputs: list[ChoiceOutput], usage: Usage) -> bytes:
        """Return the whole answer."""
        output = outputs[0]
        stop = stop_of(output.finish_reason, output.stop_string)
        return msgspec.json.encode(
            Message(
                id=answer.id,
                model=answer.model,
                content=[_block(piece) for piece in output.pieces],
                stop_reason=stop.stop_reason,
                stop_sequence=stop.stop_sequence,
                usage=usage_of(usage),
            )
        )


def parse_messages(body: bytes, struct: type[CountTokensRequest]) -> InferenceRequest:
    """Return the checked request of a messages endpoint. Raises: InvalidRequest's children."""
    translation = to_chat_request(decode_body(body, struct))
    wanted = translation.answer_schema
    request = check_chat(
        translation.request,
        prefill=translation.prefill,
        answer=None if wanted is None else schema_rule(*wanted),
        schema_path="input_schema",
    )
    return replace(request, call_ending="tool_calls")


class MessagesEncoder:
    """Encode one stream of events; holds the block that is open."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._has_started = False
        self._blocks = MessageBlocks()
        self._stop = Stop(None, None)

    def chunk(self, output: ChoiceOutput) -> bytes:
        """Return the events of all pieces."""
        events = self._start()
        for piece in output.pieces:
            events += self._add(piece)
        if output.finish_reason is not None:
            self._stop = stop_of(output.finish_reason, output.stop_string)
        return events

    def comment(self) -> bytes:
        """Return a ping: this dialect has an event for it, which serves both kinds of watchers."""
        return self.keepalive()

    def keepalive(self) -> bytes:
        """Return a ping, after the first event once the prompt's length is known."""
        return (self._start() if self._answer.usage() is not None else b"") + event_bytes(Ping())

    def end(self, usage: Usage) -> bytes:
        """Close the open block and the message."""
        ending = MessageDelta(self._stop, usage_of(usage))
        return self._blocks.close() + event_bytes(ending) + event_bytes(MessageStop())

    def error(self, error: CortexError) -> bytes:
        """Return the error event."""
        return event_bytes(error_document(error, self._answer.request_id))

    def _start(self) -> bytes:
        if self._has_started:
            return b""
        self._has_started = True
        counted = self._answer.usage()
        message = Message(
            id=self._answer.id,
            model=self._answer.model,
            content=[],
            stop_reason=None,
            stop_sequence=None,
            usage=_no_usage() if counted is None else usage_of(counted),
        )
        return event_bytes(MessageStart(message))

    def _add(self, piece: Piece) -> bytes:
        if isinstance(piece, Text):
            return self._blocks.text(piece.text)
        if isinstance(piece, Reasoning):
            return self._blocks.thinking(piece.text)
        begin = self._blocks.begin_call(tool_id(piece.key), piece.name)
        return begin + self._blocks.arguments(piece.arguments) + self._blocks.close()


def _block(piece: Piece) -> ContentBlock:
    if isinstance(piece, Text):
        return TextBlock(piece.text)
    if isinstance(piece, Reasoning):
        return thinking_block(piece.text)
    if isinstance(piece, ToolCall):
        return ToolUseBlock(tool_id(piece.key), piece.name, msgspec.Raw(piece.arguments.encode()))
    assert_never(piece)


def _no_usage() -> MessageUsage:
    return MessageUsage(input_tokens=0, cache_read_input_tokens=0, output_tokens=0)
