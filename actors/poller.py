"""Looks at this host and at the remote neurons once a second: devices, models, load.

Tells router and metrics what it saw (`HostReport`, `NeuronReport`) and answers `QueryHost` from the
last look, so a busy device never blocks an endpoint. Device queries run in a thread; a leader that
does not answer in time keeps its last report. What is asked of neurons over HTTP is
`actors.neuron_client`.
"""

from __future__ import annotations

import asyncio
import platform
import time

import msgspec

from actors.actor import AsyncActor, handles
from actors.devices import DeviceProbe
from actors.neuron_client import NeuronClient
from cortexd.errors import ActorDown, CortexError, MailboxFull, NotFound
from cortexd.log import event
from cortexd.messages import (
    ActorUp,
    AdminCommand,
    AdminReply,
    GroupDown,
    HostReport,
    LoadOnNode,
    LoadReport,
    NeuronReport,
    Ok,
    QueryHost,
    QueryLoad,
    UnloadOnNode,
)
from cortexd.messages.control import Message
from cortexd.messages.envelope import Envelope
from cortexd.neuron_list import remote_neurons

POLL_PERIOD_S = 1.0
_QUERY_DEADLINE_S = 2.0
_RECEIVERS = ("router", "metrics")


class Poller(AsyncActor):
    """Poll devices, leaders and neurons, publish what was seen."""

    async def on_start(self) -> None:
        """Look once before READY, so that the first question has an answer."""
        self._probe = await asyncio.to_thread(DeviceProbe)
        if self._probe.unavailable_reason is not None:
            event(self.log, "devices.no_gpu", reason=self._probe.unavailable_reason)
        self._loads: dict[str, tuple[str, LoadReport]] = {}  # leader name → (group, report)
        self._report = HostReport(
            hostname=platform.node(),
            os=platform.system(),
            kernel=platform.release(),
            driver_version=self._probe.driver_version,
            cuda_version=self._probe.cuda_version,
            gpu_fault=self._probe.gpu_fault,
            devices=await asyncio.to_thread(self._probe.read),
            loads=[],
            host_free_bytes=self._probe.host_free_bytes(),
        )
        self._seen_at = time.monotonic()
        self._neurons = NeuronClient(remote_neurons(self.context.settings), self._publish_neuron)
        self._loop = asyncio.create_task(self._poll_forever())

    async def on_stop(self) -> None:
        """Stop polling."""
        self._loop.cancel()
        await self._neurons.close()

    def on_actor_up(self, up: ActorUp) -> None:
        """Tell a new router or metrics actor at once what is known of the neurons."""
        if up.actor.name in _RECEIVERS:
            for report in self._neurons.reports():
                self._tell_quietly(up.actor.name, report)

    @handles(LoadOnNode)
    async def on_load_on_node(self, message: LoadOnNode, envelope: Envelope) -> Ok:
        """Load a model at a neuron and answer when it is loaded."""
        await self._neurons.load(message.node, message.options, message.policy)
        return Ok()

    @handles(UnloadOnNode)
    async def on_unload_on_node(self, message: UnloadOnNode, envelope: Envelope) -> Ok:
        """Unload a model at a neuron and answer when its memory is free."""
        await self._neurons.unload(message.node, message.model_id, force=message.force)
        return Ok()

    @handles(QueryHost)
    async def on_query_host(self, message: QueryHost, envelope: Envelope) -> HostReport:
        """Answer the last report with its age."""
        return self._current()

    @handles(AdminCommand)
    async def on_admin(self, message: AdminCommand, envelope: Envelope) -> AdminReply:
        """Answer `host`: devices and engine loads, as JSON objects."""
        if message.op != "host" or message.args:
            raise NotFound(f'unknown operation "{message.op}"; the poller knows host, no arguments')
        report = msgspec.structs.asdict(self._current())
        for name in ("devices", "loads"):
            report[name] = [msgspec.structs.asdict(entry) for entry in report[name]]
        return AdminReply(msgspec.json.encode(report))

    def on_group_down(self, down: GroupDown) -> None:
        """Forget the load of a dead group."""
        self._loads = {
            name: (group, load)
            for name, (group, load) in self._loads.items()
            if group != down.group
        }

    def _current(self) -> HostReport:
        return msgspec.structs.replace(
            self._report,
            loads=[load for _, load in self._loads.values()],
            age_s=time.monotonic() - self._seen_at,
        )

    async def _poll_forever(self) -> None:
        while True:
            try:
                await self._poll()
            except Exception:
                event(self.log, "poller.failed", 40, exc_info=True)
            await asyncio.sleep(POLL_PERIOD_S)

    async def _poll(self) -> None:
        leaders = [
            (peer.name, peer.group)
            for peer in self.peers.all()
            if peer.group and peer.rank == 0 and peer.state == "ready"
        ]
        reading = asyncio.create_task(asyncio.to_thread(self._probe.read))
        await asyncio.gather(*(self._query(name, group) for name, group in leaders))
        devices = await reading
        alive = {name for name, _ in leaders}
        self._loads = {name: load for name, load in self._loads.items() if name in alive}
        free_bytes = self._probe.host_free_bytes()
        self._report = msgspec.structs.replace(
            self._report, devices=devices, host_free_bytes=free_bytes
        )
        self._seen_at = time.monotonic()
        for receiver in _RECEIVERS:
            self._tell_quietly(receiver, self._current())

    def _publish_neuron(self, report: NeuronReport) -> None:
        for receiver in _RECEIVERS:
            self._tell_quietly(receiver, report)

    def _tell_quietly(self, receiver: str, message: Message) -> None:
        try:
            self.tell(receiver, message)
        except (ActorDown, MailboxFull):
            return  # it gets the next one

    async def _query(self, leader: str, group: str) -> None:
        try:
            load = await self.ask(leader, QueryLoad(), deadline_s=_QUERY_DEADLINE_S)
        except CortexError:
            return  # busy or gone: the last report stands until the group is down
        if isinstance(load, LoadReport):
            self._loads[leader] = (group, load)
