"""Keeps the light actors running: ordered start, restarts by rule, ordered and bounded stop.

One for one. An actor that fails more often than its intensity allows is FAILED, and the daemon then
stops in order with an error, so that whoever runs the daemon can act. Operators' commands are
serialised for each actor, never globally.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Final

from actors.root.host import Host
from actors.root.incarnation import Incarnation
from actors.root.member import Member
from actors.root.spec import Backoff, ChildSpec, Exit, Intensity, RestartAfter, RestartRule
from cortexd.errors import InvalidRequest, NotFound, ShuttingDown

_READY: Final = frozenset({"ready", "suspect"})


class _Child:
    """One light actor over all its incarnations."""

    def __init__(self, host: Host, spec: ChildSpec, on_change: Callable[[], None]) -> None:
        supervision = host.settings.supervision
        self._host = host
        self._on_change = on_change
        self.member = Member(spec)
        self.current: Incarnation | None = None
        self.lock = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._rule = RestartRule(
            spec.restart,
            Backoff(),
            Intensity(supervision.max_restarts, supervision.max_restarts_window_s),
        )

    def __repr__(self) -> str:
        return f"_Child({self.member.spec.name}, {self.member.lifecycle.state})"

    def start(self, reason: str) -> None:
        """Start the next incarnation."""
        self._timer = None
        self.member.incarnation += 1
        self.current = Incarnation(
            self._host,
            self.member,
            on_ready=lambda _: self._on_change(),
            on_exit=self._on_exit,
        )
        self.current.begin(reason)

    async def stop(self, drain_s: float, reason: str) -> None:
        """Stop it, whatever its state; it stays stopped."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self.member.move("exited", reason)
        if self.current is not None:
            await self.current.stop(drain_s, reason)

    def _on_exit(self, incarnation: Incarnation, exit_: Exit) -> None:
        self.current = None
        loop = asyncio.get_running_loop()
        verdict = self._rule.after(exit_, loop.time())
        if isinstance(verdict, RestartAfter):
            self.member.move("backoff", incarnation.reason)
            self.member.restarts += 1
            self._timer = loop.call_later(verdict.delay_s, self.start, incarnation.reason)
        else:
            self.member.move(verdict, incarnation.reason)
        if verdict == "failed":
            self._host.events.add(
                "actor.failed",
                logging.CRITICAL,
                actor=self.member.spec.name,
                reason=incarnation.reason,
                restarts=self.member.restarts,
            )
        self._on_change()


class Supervisor:
    """All light actors of the daemon."""

    def __init__(self, host: Host, specs: Iterable[ChildSpec]) -> None:
        self._changed = asyncio.Event()
        self._is_stopping = False
        self._children: dict[str, _Child] = {}
        for spec in specs:
            if spec.name in self._children:
                raise ValueError(f'two child specs are called "{spec.name}"')
            missing = [name for name in spec.listeners if name not in host.listeners]
            if missing:
                raise ValueError(f"{spec.name}: no listener called {', '.join(missing)}")
            self._children[spec.name] = _Child(host, spec, self._on_change)

    def __repr__(self) -> str:
        states = {name: child.member.lifecycle.state for name, child in self._children.items()}
        return f"Supervisor({states})"

    @property
    def members(self) -> list[Member]:
        """Return all light actors."""
        return [child.member for child in self._children.values()]

    @property
    def incarnations(self) -> list[Incarnation]:
        """Return the running processes."""
        return [child.current for child in self._children.values() if child.current]

    @property
    def failed(self) -> Member | None:
        """Return an actor that was given up, if there is one."""
        return next((m for m in self.members if m.lifecycle.state == "failed"), None)

    async def start(self) -> None:
        """Start all by rising order; return when all are ready or one was given up."""
        by_order = sorted(self._children.values(), key=lambda child: child.member.spec.order)
        for _, tier in groupby(by_order, key=lambda child: child.member.spec.order):
            children = list(tier)
            for child in children:
                child.start("start")
            # One that is suspect was ready; when it beats again is no change that wakes us.
            while not all(child.member.lifecycle.state in _READY for child in children):
                if self.failed is not None:
                    return
                await self.changed()

    async def changed(self) -> None:
        """Return at the next change of any actor's state."""
        await self._changed.wait()

    def stop_orders(self) -> set[int]:
        """Return the stop orders in use."""
        return {_stop_order(child) for child in self._children.values()}

    async def stop_tier(self, stop_order: int, reason: str) -> None:
        """Stop all of one stop order; every step is bounded. Operators' starts are refused now."""
        self._is_stopping = True
        await asyncio.gather(
            *(
                child.stop(child.member.spec.drain_s, reason)
                for child in self._children.values()
                if _stop_order(child) == stop_order
            )
        )

    def kill_all(self, reason: str) -> None:
        """SIGKILL all; none is restarted."""
        self._is_stopping = True
        for child in self._children.values():
            if child.current is not None:
                child.current.kill(reason, commanded=True)

    def find(self, name: str) -> Incarnation | None:
        """Return the running incarnation of an actor. Raises: NotFound for an unknown name."""
        return self._child(name).current

    async def stop_actor(self, name: str) -> None:
        """Stop one actor until it is started again."""
        child = self._child(name)
        async with child.lock:
            await child.stop(child.member.spec.drain_s, "stopped by operator")

    async def start_actor(self, name: str) -> None:
        """Start one stopped actor. Raises: InvalidRequest when it runs."""
        child = self._child(name)
        async with child.lock:
            if child.member.lifecycle.state not in {"exited", "failed"}:
                raise InvalidRequest(f'actor "{name}" is {child.member.lifecycle.state} already')
            self._start_again(child, "started by operator")

    async def restart_actor(self, name: str) -> None:
        """Stop and start one actor; this counts as no failure."""
        child = self._child(name)
        async with child.lock:
            await child.stop(child.member.spec.drain_s, "restarted by operator")
            self._start_again(child, "restarted by operator")

    def _start_again(self, child: _Child, reason: str) -> None:
        if self._is_stopping:
            raise ShuttingDown(f'actor "{child.member.spec.name}": the daemon is stopping')
        child.start(reason)

    def _child(self, name: str) -> _Child:
        child = self._children.get(name)
        if child is None:
            raise NotFound(f'no actor "{name}"; known: {", ".join(sorted(self._children))}')
        return child

    def _on_change(self) -> None:
        self._changed.set()  # wakes all waiters; later ones wait for the next change
        self._changed.clear()


def _stop_order(child: _Child) -> int:
    spec = child.member.spec
    return spec.order if spec.stop_order is None else spec.stop_order
