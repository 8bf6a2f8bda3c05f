"""What differs between the two OpenAI generation endpoints, seen from the code they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import msgspec

from actors.front.choice import ChoiceOutput
from actors.front.request import InferenceRequest
from cortexd.openai import Usage


@dataclass(slots=True)
class Answer:
    """The fields every document of one answer repeats. `model` is the name the client asked for."""

    id: str
    created: int
    model: str
    include_usage: bool = False
    fingerprint: str | None = None


class ChunkEncoder(Protocol):
    """Encodes one stream's events; holds what the stream has said already."""

    def chunk(self, output: ChoiceOutput) -> bytes:
        """Return the event(s) of one output."""

    def keepalive(self) -> bytes:
        """Return an event that changes nothing, for clients whose watchdog counts events."""

    def usage(self, usage: Usage) -> bytes:
        """Return the usage event."""


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


def data_event(document: msgspec.Struct) -> bytes:
    """Return one server-sent event."""
    return b"data: " + msgspec.json.encode(document) + b"\n\n"
