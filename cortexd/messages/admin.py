"""Admin operations that the root hands on to the actor that owns the subject."""

from __future__ import annotations

from cortexd.messages.control import Message


class AdminCommand(Message, frozen=True, tag="AdminCommand"):
    """Root → owner actor: run `op`; each of `args` is a JSON text. Answer `AdminReply`.

    A long operation answers at once with what it accepted and reports with `AdminProgress` under
    the same `operation_id`.
    """

    operation_id: str
    op: str
    args: dict[str, bytes] = {}


class AdminReply(Message, frozen=True, tag="AdminReply"):
    """Owner → root: `result` is a JSON document."""

    result: bytes


class AdminProgress(Message, frozen=True, tag="AdminProgress"):
    """Owner → root: event `kind` ("progress", "done" or "failed") of an operation, JSON `data`."""

    operation_id: str
    kind: str
    data: bytes
