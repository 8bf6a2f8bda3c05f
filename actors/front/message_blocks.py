"""The blocks of one streamed message: opens, fills and closes them, one at a time."""

from __future__ import annotations

import hashlib
from typing import Final

import msgspec

from cortexd.anthropic import (
    BlockDelta,
    BlockStart,
    BlockStop,
    Event,
    InputJsonDelta,
    SignatureDelta,
    Stop,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolUseBlock,
)

_encode = msgspec.json.Encoder().encode
_STOP_REASONS: Final = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageBlocks:
    """Encodes block events. Every method returns bytes to send, perhaps none."""

    def __init__(self) -> None:
        self._index = -1
        self._open: type[TextBlock | ThinkingBlock | ToolUseBlock] | None = None
        self._signer = Signer()
        self._text_event = (b"", b"")  # what stands before and after the words of a text block

    @property
    def is_call_open(self) -> bool:
        """Tell whether arguments can be added."""
        return self._open is ToolUseBlock

    def text(self, text: str) -> bytes:
        """Add words for the reader."""
        events = b"" if self._open is TextBlock else self._begin_text()
        before, after = self._text_event
        return events + before + _encode(text) + after

    def thinking(self, text: str) -> bytes:
        """Add reasoning."""
        events = self._switch_to(ThinkingBlock("", ""))
        self._signer.add(text)
        return events + event_bytes(BlockDelta(self._index, ThinkingDelta(text)))

    def begin_call(self, call_id: str, name: str) -> bytes:
        """Open a call of a tool."""
        return self.close() + self._begin(ToolUseBlock(call_id, name, msgspec.Raw(b"{}")))

    def arguments(self, text: str) -> bytes:
        """Add to the open call's arguments."""
        return event_bytes(BlockDelta(self._index, InputJsonDelta(text)))

    def close(self) -> bytes:
        """Close the open block, if there is one."""
        if self._open is None:
            return b""
        events = b""
        if self._open is ThinkingBlock:
            signature = SignatureDelta(self._signer.signature())
            events = event_bytes(BlockDelta(self._index, signature))
        self._open = None
        return events + event_bytes(BlockStop(self._index))

    def _begin_text(self) -> bytes:
        events = self._switch_to(TextBlock(""))
        before, _, after = event_bytes(BlockDelta(self._index, TextDelta(""))).rpartition(b'""')
        self._text_event = (before, after)
        return events

    def _switch_to(self, block: TextBlock | ThinkingBlock) -> bytes:
        return b"" if self._open is type(block) else self.close() + self._begin(block)

    def _begin(self, block: TextBlock | ThinkingBlock | ToolUseBlock) -> bytes:
        self._index += 1
        self._open = type(block)
        self._signer = Signer()
        return event_bytes(BlockStart(self._index, block))


class Signer:
    """Makes a thinking block's signature: a digest, for clients that insist on having one."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, text: str) -> None:
        """Take in more of the block."""
        self._digest.update(text.encode())

    def signature(self) -> str:
        """Return the signature of the block so far."""
        return self._digest.hexdigest()


def thinking_block(text: str) -> ThinkingBlock:
    """Return a whole block of reasoning, signed."""
    signer = Signer()
    signer.add(text)
    return ThinkingBlock(text, signer.signature())


def tool_id(key: str | int) -> str:
    """Return the id of a tool call that is known by `key` in its answer."""
    return f"toolu_{key}"


def stop_of(finish_reason: str | None, stop_string: str | None) -> Stop:
    """Return why a message ended, None in it while it has not; `stop_string`: at which one."""
    if stop_string is not None:
        return Stop("stop_sequence", stop_string)
    if finish_reason is None:
        return Stop(None, None)
    return Stop(_STOP_REASONS.get(finish_reason, "end_turn"), None)


def event_bytes(event: Event) -> bytes:
    """Return one server-sent event; its name stands on the event line and in the data."""
    name = event.__struct_config__.tag
    return b"event: %s\ndata: %s\n\n" % (str(name).encode(), _encode(event))
