"""A daemon's admin side for tests of commands: scripted answers, recorded requests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Self

from cortexd.errors import CortexError

Document = dict[str, object]
Answer = Document | CortexError


class FakeDaemon:
    """Answers each operation as told; also the channel that a command opens."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.event_list: list[Document] = []
        self.requests: list[tuple[str, Document]] = []
        self.is_closed = False

    def request(self, op: str, args: Mapping[str, object]) -> Document:
        """Record the request and give the scripted answer."""
        self.requests.append((op, dict(args)))
        answer = self.answers[op]
        if isinstance(answer, CortexError):
            raise answer
        return answer

    def events(self) -> Iterator[Document]:
        """Yield the scripted events; then the daemon is gone."""
        yield from self.event_list

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.is_closed = True
