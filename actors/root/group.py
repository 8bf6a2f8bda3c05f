"""Engine groups: one process per rank of a model, one failure unit, numbered by epoch.

When a rank dies its peers sit in a collective that may never return, so all of them are killed at
once; then the group is started again under the next epoch, unless the rank said that trying again
is of no use or the group has failed too often. Requests are answered to whoever asked the root;
everybody hears `GroupUp` and `GroupDown`.
"""

from __future__ import annotations

import asyncio
import logging

from actors.root.host import Host
from actors.root.incarnation import Incarnation
from actors.root.member import Member
from actors.root.spec import (
    ChildSpec,
    Exit,
    GroupBackoff,
    Intensity,
    RestartAfter,
    RestartRule,
    is_valid_name,
)
from cortexd.errors import ERRORS_BY_CODE, ErrorInfo, Internal, InvalidValue, NotFound
from cortexd.messages.control import ActorState, GroupDown, GroupStarting, GroupUp, StartGroup

_MAX_WORLD_SIZE = 64


class Group:
    """The ranks of one model."""

    def __init__(self, host: Host, order: StartGroup, last_epoch: int) -> None:
        supervision = host.settings.supervision
        self._host = host
        self.order = order
        self.name = order.group
        self.epoch = last_epoch
        self.members: list[Member] = []
        self.incarnations: list[Incarnation] = []
        self.is_stopping = False
        self._is_down = False
        self._timer: asyncio.TimerHandle | None = None
        self._restarts = 0
        self._rule = RestartRule(
            "permanent",
            GroupBackoff(supervision.max_group_restarts_window_s),
            Intensity(supervision.max_group_restarts, supervision.max_group_restarts_window_s),
        )
        self._verdict: RestartAfter | None = None

    def __repr__(self) -> str:
        states = [member.lifecycle.state for member in self.members]
        return f"Group({self.name}, epoch {self.epoch}, {states})"

    @property
    def is_alive(self) -> bool:
        """Return whether it runs, or will run again by itself."""
        return bool(self.incarnations) or self._timer is not None

    @property
    def has_failed(self) -> bool:
        """Return whether it was given up."""
        return any(member.lifecycle.state == "failed" for member in self.members)

    def start(self, reason: str) -> None:
        """Start the next epoch."""
        self._timer = None
        self._is_down = False
        self.epoch += 1
        self.members = [self._new_member(rank) for rank in range(self.order.world_size)]
        self.incarnations = [
            Incarnation(self._host, member, on_ready=self._on_ready, on_exit=self._on_exit)
            for member in self.members
        ]
        for incarnation in self.incarnations:
            incarnation.begin(reason)

    async def stop(self, drain_s: float, reason: str) -> None:
        """End all ranks; the group stays down."""
        self.is_stopping = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            for member in self.members:
                member.move("exited", reason)
        if drain_s > 0 and self.incarnations and self.incarnations[0].is_ready:
            await self.incarnations[0].drain(drain_s, reason)  # the leader owns the work
        running = list(self.incarnations)
        if running and not self._is_down:
            self._go_down(reason, will_restart=False, error=None)
        await asyncio.gather(*(incarnation.stop(0.0, reason) for incarnation in running))

    def kill(self, reason: str) -> None:
        """SIGKILL all ranks; the group stays down."""
        self.is_stopping = True
        for incarnation in self.incarnations:
            incarnation.kill(reason, commanded=True)

    def _new_member(self, rank: int) -> Member:
        spec = ChildSpec(
            name=f"{self.name}/{rank}",
            target=(rank and self.order.worker_target) or self.order.target,
            args=self.order.args,
            restart="temporary",
            preload="engine",
            start_timeout_s=self.order.start_timeout_s,
        )
        return Member(
            spec,
            group=self.name,
            epoch=self.epoch,
            rank=rank,
            world_size=self.order.world_size,
            incarnation=self.epoch,
            restarts=self._restarts,
        )

    def _on_ready(self, _: Incarnation) -> None:
        if self._is_down or not all(incarnation.is_ready for incarnation in self.incarnations):
            return
        leader = self.members[0].spec.name
        self._host.events.add("group.up", group=self.name, epoch=self.epoch, leader=leader)
        self._host.bus.publish(lambda sequence: GroupUp(sequence, self.name, self.epoch, leader))

    def _on_exit(self, incarnation: Incarnation, exit_: Exit) -> None:
        self.incarnations.remove(incarnation)
        if not self._is_down:
            self._on_first_death(incarnation, exit_)
        if not self.incarnations:
            self._on_all_dead()

    def _on_first_death(self, dead: Incarnation, exit_: Exit) -> None:
        """Take the peers down at once, then decide."""
        reason = f"rank {dead.address.name}: {dead.reason}"
        for peer in self.incarnations:
            peer.kill(reason)
        error = dead.error or next((peer.error for peer in self.incarnations if peer.error), None)
        if not self.is_stopping and not _is_structural(error):
            now_s = asyncio.get_running_loop().time()
            unasked = Exit(commanded=False, clean=False, ready_for_s=exit_.ready_for_s)
            verdict = self._rule.after(unasked, now_s)
            self._verdict = verdict if isinstance(verdict, RestartAfter) else None
        self._go_down(reason, will_restart=self._verdict is not None, error=error)

    def _go_down(self, reason: str, *, will_restart: bool, error: ErrorInfo | None) -> None:
        self._is_down = True
        level = logging.INFO if self.is_stopping else logging.ERROR
        self._host.events.add(
            "group.down",
            level,
            group=self.name,
            epoch=self.epoch,
            reason=reason,
            will_restart=will_restart,
        )
        self._host.bus.publish(
            lambda sequence: GroupDown(
                sequence, self.name, self.epoch, reason, will_restart, self.is_stopping, error
            )
        )

    def _on_all_dead(self) -> None:
        verdict, self._verdict = self._verdict, None
        if self.is_stopping:
            self._settle("exited")
        elif verdict is None:
            self._settle("failed")
        else:
            self._restarts += 1
            self._settle("backoff")
            self._timer = asyncio.get_running_loop().call_later(
                verdict.delay_s, self.start, "group restart"
            )

    def _settle(self, state: ActorState) -> None:
        for member in self.members:
            member.move(state, member.lifecycle.reason)


def _is_structural(error: ErrorInfo | None) -> bool:
    """Return whether a rank said what no retry will mend. An unforeseen exception is no such."""
    if error is None or error.code == Internal.code:
        return False
    return not ERRORS_BY_CODE.get(error.code, Internal).retriable


class Groups:
    """All engine groups, and the root's answers to `StartGroup` and `StopGroup`."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._groups: dict[str, Group] = {}
        self._epochs: dict[str, int] = {}
        self.is_closed = False

    def __repr__(self) -> str:
        return f"Groups({list(self._groups.values())})"

    @property
    def members(self) -> list[Member]:
        """Return the ranks of all groups that run or have failed."""
        return [member for group in self._groups.values() for member in group.members]

    @property
    def incarnations(self) -> list[Incarnation]:
        """Return the running processes."""
        return [one for group in self._groups.values() for one in group.incarnations]

    @property
    def has_failed(self) -> bool:
        """Return whether a group was given up."""
        return any(group.has_failed for group in self._groups.values())

    def start_group(self, order: StartGroup) -> GroupStarting:
        """Start a group; asking again for the same one is answered with the epoch that runs.

        A router that restarted while a model loads asks again. Raises: InvalidValue for a bad
        order, or another order for a group that runs.
        """
        if not is_valid_name(f"{order.group}/0") or "/" in order.group:
            raise InvalidValue(f'bad group name "{order.group}"; allowed: letters, digits, ._-')
        if not 1 <= order.world_size <= _MAX_WORLD_SIZE:
            raise InvalidValue(
                f"{order.group}: world size {order.world_size}; allowed: 1 to {_MAX_WORLD_SIZE}"
            )
        if self.is_closed:
            raise InvalidValue(f"{order.group}: the daemon is stopping")
        known = self._groups.get(order.group)
        if known is not None and known.is_alive and not known.is_stopping:
            if known.order == order:
                return GroupStarting(order.group, known.epoch)
            raise InvalidValue(
                f'group "{order.group}" runs already with another order (epoch {known.epoch})'
            )
        if known is not None:
            self._forget(known)
        group = Group(self._host, order, self._epochs.get(order.group, 0))
        self._groups[order.group] = group
        group.start("started")
        return GroupStarting(order.group, group.epoch)

    async def stop_group(self, name: str, drain_s: float) -> None:
        """Stop a group and forget it. Raises: NotFound."""
        group = self._groups.get(name)
        if group is None:
            raise NotFound(f'no group "{name}"; known: {", ".join(sorted(self._groups))}')
        await group.stop(drain_s, "stopped")
        self._forget(group)

    async def stop_all(self, drain_s: float, reason: str) -> None:
        """Stop all groups; none can be started after this."""
        self.is_closed = True
        await asyncio.gather(*(group.stop(drain_s, reason) for group in self._groups.values()))

    def kill_all(self, reason: str) -> None:
        """SIGKILL all ranks; no group is restarted."""
        self.is_closed = True
        for group in self._groups.values():
            group.kill(reason)

    def find(self, name: str) -> Incarnation | None:
        """Return the running incarnation of a rank."""
        return next((one for one in self.incarnations if one.address.name == name), None)

    def _forget(self, group: Group) -> None:
        self._epochs[group.name] = max(group.epoch, self._epochs.get(group.name, 0))
        if self._groups.get(group.name) is group:
            del self._groups[group.name]
