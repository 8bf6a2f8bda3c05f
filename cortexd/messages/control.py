"""Messages between the root supervisor and its children: life cycle, registry, groups."""

from __future__ import annotations

from typing import Literal

import msgspec

from cortexd.errors import ErrorInfo

ActorState = Literal[
    "idle", "starting", "ready", "suspect", "draining", "stopping", "backoff", "exited", "failed"
]


class Message(msgspec.Struct, frozen=True, array_like=True):
    """Base of all bodies; subclasses set `tag` to their own name."""


class Hello(Message, frozen=True, tag="Hello"):
    """Child → root, first message: the process is up and its inbox is bound."""

    pid: int
    endpoint: str  # ipc:// address of the child's inbox


class ActorInfo(Message, frozen=True, tag="ActorInfo"):
    """One line of the registry."""

    name: str
    incarnation: int
    state: ActorState
    pid: int = 0
    endpoint: str = ""
    group: str = ""  # engine group slug; empty for light actors
    epoch: int = 0
    rank: int = 0
    restarts: int = 0
    since_s: float = 0.0  # seconds in this state
    reason: str = ""  # last transition's reason
    rss_bytes: int = 0
    lag_ms: float = 0.0
    mailbox_depth: int = 0


class Welcome(Message, frozen=True, tag="Welcome"):
    """Root → child, answer to Hello: the registry as of `sequence`; events follow in order."""

    sequence: int
    actors: list[ActorInfo]


class Ready(Message, frozen=True, tag="Ready"):
    """Child → root: `on_start` has returned, it can serve."""


class Beat(Message, frozen=True, tag="Beat"):
    """Child → root, from the loop that does the work (ranks: from a helper thread)."""

    lag_ms: float
    mailbox_depth: int
    rss_bytes: int
    progress: int = 0  # ranks: count of finished steps; must move while work is queued
    busy: bool = False
    dead_letters: dict[str, int] = {}  # count by reason since the start


class Progress(Message, frozen=True, tag="Progress"):
    """Child → root while starting: loading goes on, extend the start deadline."""

    fraction: float  # 0..1
    stage: str


class Drain(Message, frozen=True, tag="Drain"):
    """Root → child: take no new work, finish what runs, within the deadline."""

    deadline_s: float


class Stop(Message, frozen=True, tag="Stop"):
    """Root → child: stop now; answer Bye and exit 0."""


class Bye(Message, frozen=True, tag="Bye"):
    """Child → root: last message before a commanded exit."""


class ActorUp(Message, frozen=True, tag="ActorUp"):
    """Root → all: this incarnation is ready."""

    sequence: int
    actor: ActorInfo


class ActorDown(Message, frozen=True, tag="ActorDown"):
    """Root → all: this incarnation is gone; nothing more will come from it."""

    sequence: int
    name: str
    incarnation: int
    group: str
    epoch: int
    reason: str


class StartGroup(Message, frozen=True, tag="StartGroup"):
    """Router → root: run one process per rank for this model, as one failure unit.

    Answered by `GroupStarting`; then `GroupUp` or `GroupDown` reach every actor.
    """

    group: str  # slug, unique per loaded model
    target: str  # "module:Class" of the rank actor
    args: bytes  # msgpack the rank decodes
    world_size: int
    start_timeout_s: float
    worker_target: str = ""  # of ranks other than 0; empty: the same target


class GroupStarting(Message, frozen=True, tag="GroupStarting"):
    """Root → router: accepted; ranks will carry this epoch."""

    group: str
    epoch: int


class GroupUp(Message, frozen=True, tag="GroupUp"):
    """Root → all: every rank of this epoch is ready; rank 0 is `leader`."""

    sequence: int
    group: str
    epoch: int
    leader: str


class GroupDown(Message, frozen=True, tag="GroupDown"):
    """Root → all: this epoch is dead. `will_restart` tells whether a new epoch is on its way."""

    sequence: int
    group: str
    epoch: int
    reason: str
    will_restart: bool
    commanded: bool
    error: ErrorInfo | None = None  # what the rank itself said before it died, if anything


class StopGroup(Message, frozen=True, tag="StopGroup"):
    """Router → root: end the group's processes, then answer Ok."""

    group: str
    drain_s: float


class SetLogLevel(Message, frozen=True, tag="SetLogLevel"):
    """Root → child: log from this level on (debug, info, warning, error)."""

    level: str


class Ping(Message, frozen=True, tag="Ping"):
    """Anyone → anyone."""


class Pong(Message, frozen=True, tag="Pong"):
    """Answer to Ping."""


class Ok(Message, frozen=True, tag="Ok"):
    """Empty positive answer."""
