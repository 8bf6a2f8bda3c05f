"""What the root lends to everything that runs children."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from actors.root.control_bus import ControlBus
from actors.root.events import EventLog
from actors.root.launcher import Launcher
from actors.root.logs import LogHub
from cortexd.messages.control import ActorInfo
from cortexd.messages.envelope import Envelope
from cortexd.settings import Settings


@dataclass(slots=True)
class Host:
    """The root's services and callbacks; one for the daemon."""

    settings: Settings
    runtime_dir: Path
    lifeline_fd: int
    listeners: dict[str, socket.socket]
    launcher: Launcher
    bus: ControlBus
    logs: LogHub
    events: EventLog
    on_request: Callable[[Envelope], None]
    on_gone: Callable[[str, str], None]  # actor name, reason
    ready_actors: Callable[[], list[ActorInfo]]
