"""How an actor tells the root what became of an operator's long operation."""

from __future__ import annotations

from typing import Literal

import msgspec

from actors.actor import AsyncActor
from cortexd.errors import MailboxFull
from cortexd.log import event
from cortexd.messages import AdminProgress


def report_operation(
    actor: AsyncActor, operation_id: str, kind: Literal["progress", "done", "failed"], data: object
) -> None:
    """Send one event of an operation; `data` becomes a JSON object, a struct one of its fields."""
    try:
        actor.tell("root", AdminProgress(operation_id, kind, json_object(data)))
    except MailboxFull:
        event(actor.log, "admin.progress_dropped", 30, operation=operation_id, kind=kind)


def json_object(data: object) -> bytes:
    """Return JSON with field names: messages and errors travel as arrays only between actors."""
    if isinstance(data, msgspec.Struct):
        data = msgspec.structs.asdict(data)
    return msgspec.json.encode(data)
