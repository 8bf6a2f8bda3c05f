"""The wire form of a message: a header frame and a body frame, both MessagePack."""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec

from cortexd.errors import ErrorInfo, RequestTooLarge
from cortexd.messages import Body
from cortexd.messages.control import Message
from cortexd.messages.envelope import Header

# A receiver drops the whole connection on a larger message and the sender sees nothing of it, so
# the size is checked before the send as well.
MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024

_encode = msgspec.msgpack.Encoder().encode
_T = TypeVar("_T")
_header_decoder = msgspec.msgpack.Decoder(Header)
_body_decoder = msgspec.msgpack.Decoder(Body)


def encode_message(header: Header, body: Message | ErrorInfo) -> tuple[bytes, bytes]:
    """Return the two frames of a message. Raises: RequestTooLarge."""
    frames = (_encode(header), _encode(body))
    size = len(frames[0]) + len(frames[1])
    if size > MAX_MESSAGE_BYTES:
        raise RequestTooLarge(
            f"{type(body).__name__} for {header.dst} has {size} bytes; allowed: {MAX_MESSAGE_BYTES}"
        )
    return frames


def decode_header(frame: bytes) -> Header:
    """Return the header. Raises: msgspec.MsgspecError."""
    return _decoded(_header_decoder, frame)


def decode_body(frame: bytes) -> Message | ErrorInfo:
    """Return the body. Raises: msgspec.MsgspecError for anything but a known, valid message."""
    body: Message | ErrorInfo = _decoded(_body_decoder, frame)
    return body


def _decoded(decoder: msgspec.msgpack.Decoder[_T], frame: bytes) -> _T:
    try:
        return decoder.decode(frame)
    except UnicodeDecodeError as error:  # the one fault that msgspec lets out under another name
        raise msgspec.DecodeError(f"text is not UTF-8: {error}") from error
