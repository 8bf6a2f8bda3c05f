"""The envelope of every message between actors, and what travels of it in the header frame.

A message is two frames: this header, then a body of `cortexd.messages.Body`, both msgpack. Times
are CLOCK_MONOTONIC, which all processes of one host share.
"""

from __future__ import annotations

from typing import Final

import msgspec

from cortexd.errors import ErrorInfo
from cortexd.messages.control import Message

HEADER_VERSION: Final = 1


class Address(msgspec.Struct, frozen=True, array_like=True):
    """An actor's name and which start of it is meant; incarnation 0 is whichever runs now."""

    name: str
    incarnation: int

    def __str__(self) -> str:
        return f"{self.name}.{self.incarnation}"


ROOT: Final = Address("root", 1)


class Header(msgspec.Struct, frozen=True, array_like=True):
    """First frame. `id` counts per sender; `re` is the id this answers, 0 when it answers none.

    A message that awaits an answer has a deadline (`deadline_ns` > 0) and is no answer itself.
    `epoch` is the engine group's for messages to and from ranks, else 0.
    """

    id: int
    re: int
    src: Address
    dst: Address
    epoch: int = 0
    deadline_ns: int = 0
    version: int = HEADER_VERSION


class Envelope(msgspec.Struct, frozen=True):
    """One received message: the header's fields and the decoded body."""

    id: int
    re: int
    src: Address
    dst: Address
    epoch: int
    deadline_ns: int
    body: Message | ErrorInfo

    @property
    def wants_reply(self) -> bool:
        """Return whether the sender awaits an answer."""
        return self.deadline_ns > 0 and self.re == 0
