"""Toy actors for the tree tests: they answer, and misbehave on command.

A command is an `AdminCommand` whose `op` says what to do; importable by child processes.
"""

from __future__ import annotations

import os

import msgspec

from actors.actor import AsyncActor, handles
from cortexd.messages import AdminCommand, AdminReply
from cortexd.messages.envelope import Envelope


class Toy(AsyncActor):
    """Answers and misbehaves."""

    async def on_start(self) -> None:
        """Crash at once when told so."""
        if self.context.args == b"crash":
            raise RuntimeError("told to crash in on_start")

    @handles(AdminCommand)
    async def on_command(self, message: AdminCommand, envelope: Envelope) -> AdminReply | None:
        """Do what `op` says."""
        match message.op:
            case "pid":
                return AdminReply(msgspec.json.encode(os.getpid()))
        return None
