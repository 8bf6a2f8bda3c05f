"""A messages answer made from another server's chat answer: whole, and event by event.

The stream is read as the specification of server-sent events has it (lines of any ending, comments,
several `data` lines to an event), and in bytes, since a chunk of the network may end anywhere.
"""

from __future__ import annotations

from typing import Final

import msgspec

from actors.front.message_blocks import (
    MessageBlocks,
    event_bytes,
    stop_of,
    thinking_block,
    tool_id,
)
from actors.front.relayed import Counts
from cortexd.anthropic import (
    ContentBlock,
    Message,
    MessageDelta,
    MessageStart,
    MessageStop,
    Stop,
    TextBlock,
    ToolUseBlock,
    usage_of,
)
from cortexd.chat_answer import CallPart, ChatDocument, Choice, Counted, usage_from
from cortexd.errors import UpstreamError, UpstreamInterrupted, UpstreamProtocol
from cortexd.foreign_error import foreign_error

_MAX_BAD_EVENTS: Final = 3
_MAX_HELD_BYTES: Final = 1024 * 1024
_decoder = msgspec.json.Decoder(ChatDocument)
_object_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def whole_message(body: bytes, *, message_id: str, model: str, node: str) -> bytes:
    """Return the answer in the messages dialect. Raises: UpstreamError."""
    try:
        document = _decoder.decode(body)
        choice = document.choices[0]
        blocks = _blocks_of(choice)
    except (msgspec.DecodeError, UnicodeDecodeError, IndexError, RecursionError) as error:
        raise UpstreamError(f'node "{node}" answered with no chat completion: {error}') from None
    stop = _stop(choice, is_calling=isinstance(blocks[-1] if blocks else None, ToolUseBlock))
    message = Message(
        id=message_id,
        model=model,
        content=blocks,
        stop_reason=stop.stop_reason,
        stop_sequence=stop.stop_sequence,
        usage=usage_of(usage_from(document.usage)),
    )
    return msgspec.json.encode(message)


def _blocks_of(choice: Choice) -> list[ContentBlock]:
    words = choice.message
    if words is None:
        raise msgspec.DecodeError("the choice has no message")
    blocks: list[ContentBlock] = [thinking_block(words.thoughts)] if words.thoughts else []
    if words.content:
        blocks.append(TextBlock(words.content))
    for call in words.tool_calls or []:
        arguments = (call.function.arguments or "").strip() or "{}"
        _object_decoder.decode(arguments)  # a client could do nothing with broken arguments
        tool_id, name = _identity(call, len(blocks))
        blocks.append(ToolUseBlock(tool_id, name, msgspec.Raw(arguments.encode())))
    return blocks


def _identity(call: CallPart, position: int) -> tuple[str, str]:
    return call.id or tool_id(position), call.function.name or ""


def _stop(choice: Choice, *, is_calling: bool) -> Stop:
    """Return why it ended: in that dialect a call forced by name ends with "stop"."""
    found = choice.stop_reason if choice.finish_reason == "stop" else None
    reason = choice.finish_reason or "stop"
    if is_calling and reason == "stop":
        return stop_of("tool_calls", None)
    return stop_of(reason, found if isinstance(found, str) else None)


class ForeignStream:
    """Follows one chat stream and says the same in message events. Same use as `RelayedStream`."""

    def __init__(self, *, message_id: str, model: str, node: str) -> None:
        self._message_id = message_id
        self._model = model
        self._node = node
        self._held = b""
        self._data: list[bytes] = []
        self._blocks = MessageBlocks()
        self._call_index: int | None = None
        self._num_chunks = 0
        self._num_bad = 0
        self._counted: Counted | None = None
        self._stop: Stop | None = None
        self._is_open = False
        self._is_ended = False
        self._failure: UpstreamInterrupted | None = None

    # Whole events only leave here, so one of ours fits after any of them.
    is_between_events: Final = True

    @property
    def takes_chunks(self) -> bool:
        """Tell whether `push_chunk` may be called: no event is half here."""
        return not self._held and not self._data

    def push_chunk(self, framed: bytes, start: int) -> bytes:
        """Do as `push` does for whole events in an HTTP chunk; return a chunk.

        Raises: UpstreamInterrupted.
        """
        end = len(framed) - 4
        if (
            framed.find(b"\n", start) == end  # one line, as most are
            and framed.startswith(b"data: ", start)
            and framed.find(b"\r", start, end) < 0
        ):
            events = self._event(framed[start + 6 : end])
        else:
            events = self.push(framed[start:-2])
        return b"%x\r\n%b\r\n" % (len(events), events) if events else b""

    @property
    def has_data(self) -> bool:
        """Tell whether the model has begun to answer."""
        return self._num_chunks > 0

    @property
    def num_tokens(self) -> int:
        """Return how many tokens have passed if each had a chunk of its own."""
        return self._num_chunks

    @property
    def finish_reason(self) -> str | None:
        """Return why the model stopped, None when the stream did not say."""
        return None if self._stop is None else self._stop.stop_reason

    @property
    def error_code(self) -> str | None:
        """Return the code of an error event, None when there was none."""
        return None if self._failure is None else self._failure.code

    def counts(self) -> Counts:
        """Return the tokens as the server counted them, else the chunks."""
        usage = usage_from(self._counted, self._num_chunks)
        cached = usage.prompt_tokens_details.cached_tokens
        return Counts(
            usage.prompt_tokens,
            usage.completion_tokens,
            cached,
            is_estimated=self._counted is None,
        )

    def push(self, chunk: bytes) -> bytes:
        """Return the events that follow from the chunk. Raises: UpstreamInterrupted."""
        if self._failure is not None:
            raise self._failure
        if not self._held and not self._data and _is_plain(chunk):
            return b"".join([self._event(data[6:]) for data in chunk[:-2].split(b"\n\n")])
        data = self._held + chunk
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        lines = data.split(b"\n")
        self._held = lines.pop()
        if len(self._held) > _MAX_HELD_BYTES:
            self._fail(f"sent a line of more than {_MAX_HELD_BYTES} bytes", UpstreamProtocol)
        return b"".join(self._line(line) for line in lines)

    def flush(self) -> bytes:
        """Return what ends the message. Raises: UpstreamInterrupted when it is not whole."""
        events = self._line(self._held) + self._line(b"")
        if self._failure is None and self._stop is None:
            self._fail("ended in the middle of its answer")
        if self._failure is not None:
            raise self._failure
        return events + self._end()

    def _line(self, line: bytes) -> bytes:
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
            return b""
        if line or not self._data:
            return b""
        data, self._data = b"\n".join(self._data), []
        return self._event(data)

    def _event(self, data: bytes) -> bytes:
        if self._failure is not None or self._is_ended:
            return b""
        if data == b"[DONE]":
            return b"" if self._stop is None else self._end()
        try:
            document = _decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._num_bad += 1
            if self._num_bad >= _MAX_BAD_EVENTS:
                what = f"sent {self._num_bad} events that are no chunks"
                self._fail(what, UpstreamProtocol)
            return b""
        if document.error is not None:
            self._fail(foreign_error(self._node, 502, data).message, is_told=True)
            return b""
        if document.usage is not None:
            self._counted = document.usage
        events = b"" if self._is_open else self._start()
        return events + self._choice(document.choices[0]) if document.choices else events

    def _start(self) -> bytes:
        self._is_open = True
        message = Message(
            id=self._message_id,
            model=self._model,
            content=[],
            stop_reason=None,
            stop_sequence=None,
            usage=usage_of(usage_from(self._counted)),
        )
        return event_bytes(MessageStart(message))

    def _choice(self, choice: Choice) -> bytes:
        events = b""
        words = choice.delta
        if words is not None:
            thoughts, content, calls = words.thoughts, words.content, words.tool_calls
            if thoughts or content or calls:
                self._num_chunks += 1
            if thoughts:
                events += self._blocks.thinking(thoughts)
            if content:
                events += self._blocks.text(content)
            for call in calls or ():
                events += self._call(call)
        if choice.finish_reason is not None:
            self._stop = _stop(choice, is_calling=self._call_index is not None)
        return events

    def _call(self, call: CallPart) -> bytes:
        events = b""
        index = call.index or 0
        if self._call_index is None or index > self._call_index:
            self._call_index = index
            events += self._blocks.begin_call(*_identity(call, index))
        elif index < self._call_index or not self._blocks.is_call_open:
            self._fail("went back to a tool call it had finished", UpstreamProtocol)
            return b""
        if call.function.arguments:
            events += self._blocks.arguments(call.function.arguments)
        return events

    def _end(self) -> bytes:
        if self._is_ended or self._stop is None:
            return b""
        self._is_ended = True
        usage = usage_of(usage_from(self._counted, self._num_chunks))
        ending = event_bytes(MessageDelta(self._stop, usage)) + event_bytes(MessageStop())
        return (b"" if self._is_open else self._start()) + self._blocks.close() + ending

    def _fail(
        self,
        what: str,
        error_class: type[UpstreamInterrupted] = UpstreamInterrupted,
        *,
        is_told: bool = False,
    ) -> None:
        text = what if is_told else f'node "{self._node}" {what}; try again'
        self._failure = self._failure or error_class(text, retry_after_s=2)


def _is_plain(chunk: bytes) -> bool:
    """Tell whether a chunk is nothing but whole events of one `data` line each, as most are."""
    num_events = chunk.count(b"\n\ndata: ") + 1
    return (
        chunk.startswith(b"data: ")
        and chunk.endswith(b"\n\n")
        and chunk.count(b"\n") == 2 * num_events
        and b"\r" not in chunk
    )
