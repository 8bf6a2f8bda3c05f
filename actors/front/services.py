"""What every HTTP handler of one front shares. Built by the front actor, read by the handlers."""

from __future__ import annotations

import asyncio
import logging
import platform
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from aiohttp import web

from actors.front.auth import KeyRing
from actors.front.bus import Bus
from actors.front.grammars import Grammars
from actors.front.leases import Leases
from actors.front.loop_lag import LoopLag
from actors.front.reports import Reports
from actors.front.sequences import SequenceTable
from actors.front.spending import Spending
from actors.front.text_models import TextModels
from actors.front.upstream import Upstream
from actors.open_requests import OpenRequests
from cortexd.errors import CortexError
from cortexd.keys import node_keys
from cortexd.messages import Measured
from cortexd.messages.control import Message
from cortexd.metrics import CANCEL_LATENCY, LOOP_LAG
from cortexd.neuron_list import local_node_name, remote_neurons
from cortexd.settings import Settings


@dataclass(slots=True)
class Services:
    """One front's state: the bus, the running sequences, the text models, the drain flag."""

    settings: Settings
    bus: Bus
    log: logging.Logger
    sequences: SequenceTable
    text_models: TextModels
    open_requests: OpenRequests
    upstream: Upstream = field(default_factory=Upstream)
    grammars: Grammars = field(default_factory=Grammars)
    keys: KeyRing = field(init=False)
    spending: Spending = field(init=False)
    reports: Reports = field(init=False)
    leases: Leases = field(init=False)
    loop_lag: LoopLag = field(init=False)
    node_keys: dict[str, str] = field(init=False, repr=False)
    node: str = field(init=False)
    num_neurons: int = field(init=False)
    serves_here: bool = field(init=False)
    started: float = field(default_factory=time.monotonic)
    created: int = field(default_factory=lambda: int(time.time()))
    is_draining: bool = False
    ending: CortexError | None = None  # what all requests that still run are ended with
    num_active: int = 0
    # Tokens/s of the last whole answer, by model and node.
    answer_speeds: dict[tuple[str, str], float] = field(default_factory=dict)
    num_lost_messages: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    _lease_prefix: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    _num_leases: int = 0
    _to_end: set[Callable[[], None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.node = local_node_name(self.settings, platform.node())
        self.num_neurons = len(remote_neurons(self.settings))
        self.serves_here = self.settings.role != "gateway"
        self.keys = KeyRing(self.settings.entitlements)
        self.spending = Spending(self.bus)
        self.leases = Leases(lambda message: self.tell_quietly("router", message))
        self.reports = Reports(
            lambda reports: self.tell_quietly("metrics", reports), self.open_requests
        )
        self.loop_lag = LoopLag(lambda: self.num_active > 0, self._note_lags)
        self.node_keys = node_keys(remote_neurons(self.settings))

    @property
    def has_neurons(self) -> bool:
        """Tell whether requests may be handed on."""
        return self.num_neurons > 0

    @property
    def has_choice(self) -> bool:
        """Tell whether a request may go to more than one place."""
        return self.num_neurons + self.serves_here > 1

    def new_lease_id(self) -> str:
        """Return an id that no other request of any front has: a client may reuse its own."""
        self._num_leases += 1
        return f"{self._lease_prefix}{self._num_leases:x}"

    def tell_quietly(self, name: str, message: Message) -> None:
        """Send what a dead receiver does not need: its own death has released it."""
        try:
            self.bus.tell(name, message)
        except CortexError:
            self.num_lost_messages += 1  # /health shows the count

    def note_cancelled(self, model: str, seconds: float) -> None:
        """Tell metrics how long the engine took to free a cancelled sequence."""
        sample = CANCEL_LATENCY.sample(seconds, model=model, node=self.node)
        self.tell_quietly("metrics", Measured([sample]))

    def _note_lags(self, lags: list[float]) -> None:
        self.tell_quietly("metrics", Measured([LOOP_LAG.sample(lag) for lag in lags]))

    def tell_of_end(self, end: Callable[[], None]) -> None:
        """Let `end_all` call `end`, until `forget_end`: for what no sequence stands for."""
        self._to_end.add(end)

    def forget_end(self, end: Callable[[], None]) -> None:
        """Call it no more."""
        self._to_end.discard(end)

    def end_all(self, error: CortexError) -> None:
        """End every request that still runs: their streams get this error as the last event."""
        self.ending = error
        self.sequences.fail_all(error)
        for end in list(self._to_end):
            end()

    def enter(self) -> None:
        """Count an inference request in."""
        self.num_active += 1
        self.idle.clear()
        self.loop_lag.start()

    def leave(self) -> None:
        """Count an inference request out; wake a drain that waits for the last."""
        self.num_active -= 1
        if self.num_active == 0:
            self.idle.set()


SERVICES: web.RequestKey[Services] = web.RequestKey("services", Services)
# Only the API listener hands requests on: a neuron serves its own, so that nothing goes in circles.
FORWARDS: web.RequestKey[bool] = web.RequestKey("forwards", bool)
REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
