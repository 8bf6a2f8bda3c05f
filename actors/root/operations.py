"""Long admin operations: numbered, their events in order, the last ones kept for questions.

An operation's client first reads that it was accepted, then its events, however fast the owner of
the subject is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec

from cortexd.errors import CortexError, ErrorInfo, NotFound

OperationState = Literal["running", "done", "failed"]
EventKind = Literal["progress", "done", "failed"]
Document = dict[str, object]
Listener = Callable[[EventKind, "Operation", object], None]
_KEPT_OPERATIONS: Final = 256


@dataclass(slots=True)
class Operation:
    """One operation. `target` is the actor that carries it out."""

    op_id: str
    op: str
    target: str
    state: OperationState = "running"
    started_at: float = field(default_factory=time.time)
    data: object = None
    listener: Listener | None = None
    _waiting: list[tuple[EventKind, object]] = field(default_factory=list)

    def describe(self) -> Document:
        """Return what `operation` answers."""
        return {
            "op_id": self.op_id,
            "op": self.op,
            "target": self.target,
            "state": self.state,
            "started_at": self.started_at,
            "data": self.data,
        }

    def listen(self, listener: Listener) -> None:
        """Hand all events to `listener`, those that came before first."""
        self.listener = listener
        waiting, self._waiting = self._waiting, []
        for kind, data in waiting:
            listener(kind, self, data)

    def add(self, kind: EventKind, data: object) -> None:
        """Take in an event; an operation ends once."""
        if self.state != "running":
            return
        self.data = data
        if kind != "progress":
            self.state = kind
        if self.listener is None:
            self._waiting.append((kind, data))
        else:
            self.listener(kind, self, data)


class Operations:
    """All operations, oldest first."""

    def __init__(self) -> None:
        self._operations: dict[str, Operation] = {}
        self._count = 0

    def __repr__(self) -> str:
        running = sum(one.state == "running" for one in self._operations.values())
        return f"Operations({self._count} so far, {running} running)"

    def begin(self, op: str, target: str) -> Operation:
        """Return a new operation."""
        self._count += 1
        operation = Operation(f"op-{self._count}", op, target)
        self._operations[operation.op_id] = operation
        if len(self._operations) > _KEPT_OPERATIONS:
            ended = (key for key, one in self._operations.items() if one.state != "running")
            oldest = next(ended, next(iter(self._operations)))
            del self._operations[oldest]
        return operation

    def get(self, op_id: str) -> Operation:
        """Return an operation. Raises: NotFound."""
        operation = self._operations.get(op_id)
        if operation is None:
            raise NotFound(f'no operation "{op_id}"; see "operations"')
        return operation

    def all(self) -> list[Operation]:
        """Return all kept operations."""
        return list(self._operations.values())

    def fail_target(self, target: str, error: CortexError) -> None:
        """Fail all running operations of an actor that is gone."""
        for operation in self.all():
            if operation.target == target:
                operation.add("failed", error_document(error.to_info()))


def error_document(info: ErrorInfo) -> Document:
    """Return the JSON form of an error."""
    return {
        "code": info.code,
        "message": info.message,
        "param": info.param,
        "retry_after_s": info.retry_after_s,
        "details": info.details,
    }


def decode_json(data: bytes) -> object:
    """Return a JSON document that an actor sent; empty stands for null."""
    return msgspec.json.decode(data) if data else None
