"""What differs between the generation endpoints, seen from the code they share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec

from actors.front.choice import ChoiceOutput
from actors.front.request import InferenceRequest
from cortexd.errors import CortexError
from cortexd.openai import Usage


@dataclass(slots=True)
class Answer:
    """The fields every document of one answer repeats. `model` is the name the client asked for.

    `usage` is what has been counted so far, None while the prompt has not been.
    """

    id: str
    created: int
    model: str
    request_id: str
    include_usage: bool = False
    fingerprint: str | None = None
    usage: Callable[[], Usage | None] = lambda: None


class ChunkEncoder(Protocol):
    """Encodes one stream's events; holds what the stream has said already."""

    def chunk(self, output: ChoiceOutput) -> bytes:
        """Return the event(s) of one output."""

    def comment(self) -> bytes:
        """Return the least that fills a silence, for hops that count bytes."""

    def keepalive(self) -> bytes:
        """Return an event that changes nothing, for clients whose watchdog counts events."""

    def end(self, usage: Usage) -> bytes:
        """Return what closes a whole answer."""

    def error(self, error: CortexError) -> bytes:
        """Return what closes an answer that failed."""


class Dialect(Protocol):
    """One endpoint's shapes."""

    route: str
    id_prefix: str

    def parse(self, body: bytes) -> InferenceRequest:
        """Return the checked request. Raises: InvalidRequest's children."""

    def encoder(self, answer: Answer) -> ChunkEncoder:
        """Return a fresh stream encoder."""

    def response(self, answer: Answer, outputs: list[ChoiceOutput], usage: Usage) -> bytes:
        """Return the whole answer; `outputs` holds one merged output per choice, by index."""


# One newline: a blank line after a comment makes older client decoders dispatch an empty event.
COMMENT: Final = b": ping\n"
DONE: Final = b"data: [DONE]\n\n"


async def encoded(outputs: list[ChoiceOutput], encode: Callable[[], bytes]) -> bytes:
    """Return the outputs' bytes from `encode`; a prompt's scores are written out in a thread.

    Those of a long prompt take two seconds, in which other streams would stand still.
    """
    if any(output.prompt is not None for output in outputs):
        return await asyncio.to_thread(encode)
    return encode()


def data_event(document: msgspec.Struct) -> bytes:
    """Return one server-sent event."""
    return b"data: " + msgspec.json.encode(document) + b"\n\n"
