"""What the daemon says of itself: the `status` document and its parts."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Final

import msgspec

from actors.root.admin_request import PROTOCOL_VERSION
from actors.root.group import Groups
from actors.root.host import Host
from actors.root.member import Member
from actors.root.operations import Document
from actors.root.supervisor import Supervisor
from cortexd import __version__
from cortexd.errors import ActorDown, CortexError
from cortexd.fleet_state import fleet_state
from cortexd.messages import ListModels, ModelList

# A hung router costs `status` its models, not its answer.
_MODELS_DEADLINE_S: Final = 1.0


@dataclass(slots=True, frozen=True)
class DaemonInfo:
    """What does not change while the daemon runs. `addresses`: "api" → "host:port"."""

    role: str
    addresses: dict[str, str]
    started_at_s: float = field(default_factory=time.monotonic)


class Status:
    """Reads the supervisor, the groups and the router; changes nothing but its two flags."""

    def __init__(
        self, host: Host, supervisor: Supervisor, groups: Groups, info: DaemonInfo
    ) -> None:
        self._host = host
        self._supervisor = supervisor
        self._groups = groups
        self._info = info
        self.is_started = False
        self.is_stopping = False

    async def document(self) -> Document:
        """Return the whole status; `models` is null when the router does not answer."""
        known, models_error = await self._known_models()
        status: Document = {
            "v": PROTOCOL_VERSION,
            "pid": os.getpid(),
            "version": __version__,
            "uptime_s": round(time.monotonic() - self._info.started_at_s, 3),
            "role": self._info.role,
            "state": self._state(known),
            "listen": self._info.addresses,
            "actors": self.actors(),
            "models": None if known is None else msgspec.to_builtins(known.models),
            "nodes": [] if known is None else _nodes(known),
            "dead_letters": self.dead_letters(),
        }
        if models_error is not None:
            status["models_error"] = models_error
        return status

    def actors(self) -> list[Document]:
        """Return one line for each actor and rank."""
        lines = [msgspec.structs.asdict(member.info()) for member in self._members()]
        for line in lines:
            del line["endpoint"]
        return lines

    def dead_letters(self) -> Document:
        """Return dead-letter counts by actor and reason."""
        counts: Document = {"root": self._host.bus.dead_letters.snapshot()}
        for member in self._members():
            if member.dead_letters:
                counts[member.spec.name] = member.dead_letters
        return counts

    def names(self) -> list[str]:
        """Return the names of the root, the actors and the ranks."""
        return ["root", *sorted(member.spec.name for member in self._members())]

    def _members(self) -> list[Member]:
        return self._supervisor.members + self._groups.members

    async def _known_models(self) -> tuple[ModelList | None, str | None]:
        """Return what the router knows of models and nodes, or why that is unknown."""
        try:
            router = self._supervisor.find("router")
            if router is None or not router.is_ready:
                raise ActorDown('actor "router" is not running')
            answer = await self._host.bus.ask(
                router.address, ListModels(), deadline_s=_MODELS_DEADLINE_S
            )
        except CortexError as error:
            return None, error.message
        if not isinstance(answer, ModelList):
            return None, f"the router answered {type(answer).__name__}"
        return answer, None

    def _state(self, known: ModelList | None) -> str:
        """Return one word: that of `/health`, and what only the root sees counts as a fault too."""
        if self.is_stopping:
            return "stopping"
        if not self.is_started:
            return "starting"
        if known is None:
            return "degraded"
        state = fleet_state(known, serves_here=self._info.role != "gateway")
        states = {member.lifecycle.state for member in self._supervisor.members}
        has_faults = self._groups.has_failed or not states <= {"ready"}
        return "impaired" if state == "ok" and has_faults else state


def _nodes(known: ModelList) -> list[Document]:
    nodes = [msgspec.structs.asdict(node) for node in known.nodes]
    for node in nodes:
        node["models"] = [msgspec.structs.asdict(model) for model in node["models"]]
    documents: list[Document] = msgspec.to_builtins(nodes)
    return documents
