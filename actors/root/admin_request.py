"""The shape of admin requests: one struct for each operation's arguments, decoded strictly.

Pure. What is not valid is an error that names the field, before any operation runs.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from actors.root.logs import RING_LINES
from cortexd.errors import InvalidJson, InvalidValue, RequestTooLarge

PROTOCOL_VERSION: Final = 1
MAX_REQUEST_BYTES: Final = 1024 * 1024

RawArgs = dict[str, msgspec.Raw]
_Args = TypeVar("_Args")


class Request(msgspec.Struct, frozen=True):
    """One request. Unknown keys are for later versions and passed over."""

    v: int
    id: str
    op: str
    args: RawArgs = {}


class _Arguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the arguments of one operation."""


class NoArgs(_Arguments, frozen=True):
    """For operations that take none."""


class ActorArgs(_Arguments, frozen=True):
    """`actor.stop|start|restart|kill|stack`: an actor's name."""

    name: str


class LogsArgs(_Arguments, frozen=True):
    """`actor.logs`: the last lines of one actor or of all, and with `follow` all later ones."""

    name: str | None = None
    lines: Annotated[int, Meta(ge=0, le=RING_LINES)] = 100
    follow: bool = False


class EventsArgs(_Arguments, frozen=True):
    """`events`: those after a sequence number, and with `follow` all later ones."""

    since: Annotated[int, Meta(ge=0)] = 0
    follow: bool = False


class LevelArgs(_Arguments, frozen=True):
    """`loglevel` of an actor, or of "root"."""

    name: str
    level: Literal["debug", "info", "warning", "error"]


class ShutdownArgs(_Arguments, frozen=True):
    """`shutdown`: in order, or `now` by SIGKILL."""

    now: bool = False


class CancelArgs(_Arguments, frozen=True):
    """`cancel`: end the stream that the request `id` began."""

    id: str


class OperationArgs(_Arguments, frozen=True):
    """`operation`: the state of one long operation."""

    op_id: str


def decode_request(frame: bytes) -> Request:
    """Return a request. Raises: InvalidJson, InvalidValue, RequestTooLarge."""
    if len(frame) > MAX_REQUEST_BYTES:
        raise RequestTooLarge(f"a request of {len(frame)} bytes; allowed: {MAX_REQUEST_BYTES}")
    try:
        request = msgspec.json.decode(frame, type=Request)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidJson(
            f'bad request: {error}; expected {{"v": 1, "id": text, "op": text, "args": object}}'
        ) from error
    if request.v != PROTOCOL_VERSION:
        raise InvalidValue(f"protocol version {request.v}; this daemon speaks {PROTOCOL_VERSION}")
    return request


def decode_args(args: RawArgs, kind: type[_Args]) -> _Args:
    """Return the arguments of an operation. Raises: InvalidValue."""
    try:
        return msgspec.json.decode(msgspec.json.encode(args), type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidValue(f"bad arguments: {error}") from error
