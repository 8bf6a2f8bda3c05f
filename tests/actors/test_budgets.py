"""The owner of the budgets: what it remembers over its own death, and over that of others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from actors.actor import ActorContext
from actors.budgets import Budgets
from actors.registry import Registry
from cortexd.errors import (
    ActorDown as ActorDownError,
)
from cortexd.errors import (
    InsufficientQuota,
    InvalidApiKey,
    ServiceUnavailable,
)
from cortexd.keys import Key, key_digest
from cortexd.messages import (
    ActorDown,
    ActorUp,
    AdminCommand,
    Gauges,
    KeysChanged,
    Measured,
    ReportUsage,
    Reserve,
    UsageEntry,
)
from cortexd.messages.control import ActorInfo, Message
from cortexd.settings import Paths, Settings
from tests.doubles.router_world import envelope
from tests.waiting import DEADLINE_S

KEY = Key(key_id="k", key_sha256=key_digest("k"), account_id="team", hard_cap=100)


class Peers:
    """A runtime with one front and a metrics actor that may be away."""

    def __init__(self) -> None:
        self.peers = Registry()
        self.told: list[Message] = []
        self.is_deaf = False
        self.peers.apply(ActorUp(self.peers.sequence + 1, ActorInfo("front.0", 1, "ready")))

    def tell(self, name: str, body: Message) -> None:
        """Keep a message to metrics."""
        if self.is_deaf:
            raise ActorDownError("metrics is down")
        self.told.append(body)

    async def ask(self, name: str, body: Message, *, deadline_s: float) -> Message:
        """Not used by the budgets."""
        raise AssertionError(name)

    async def wait_for(self, name: str, *, deadline_s: float) -> ActorInfo:
        """Not used by the budgets."""
        raise AssertionError(name)

    def report_progress(self, fraction: float, stage: str) -> None:
        """Not used by the budgets."""


class Life:
    """One incarnation of the owner."""

    def __init__(self, folder: Path) -> None:
        context = ActorContext(
            name="budgets",
            incarnation=1,
            settings=Settings(paths=Paths(state_dir=str(folder / "state"))),
            args=b"",
            listeners={},
            log=logging.getLogger("test"),
            runtime_dir=folder,
        )
        self.actor, self.peers = Budgets(context), Peers()
        self.actor.attach(self.peers)

    async def start(self, *keys: Key) -> Life:
        """Start and tell the keys."""
        await self.actor.on_start()
        self.actor.on_keys_changed(KeysChanged(list(keys or (KEY,))), envelope())
        return self

    def reserve(self, request: str, tokens: int, front: str = "front.0") -> None:
        """Reserve as a front does."""
        self.actor.on_reserve(Reserve(request, "k", tokens), envelope(front=front))

    def report(self, request: str, prompt: int, completion: int, *, final: bool = False) -> None:
        """Report as a front does."""
        entry = UsageEntry(request, prompt, completion, final)
        self.actor.on_report_usage(ReportUsage([entry]), envelope())

    async def figures(self) -> tuple[int, int]:
        """Return what the key has spent and reserved."""
        reply = await self.actor.on_admin(AdminCommand("op-1", "keys"), envelope())
        (entry,) = msgspec.json.decode(reply.result)["keys"]
        return entry["spent"], entry["reserved"]

    def exported(self, name: str) -> list[float]:
        """Return the values of one metric, in order."""
        return [
            sample.value
            for message in self.peers.told
            if isinstance(message, Measured | Gauges)
            for sample in message.samples
            if sample.metric == name
        ]


async def _within(test: Awaitable[None]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        await test


def async_test(function: Callable[[Path], Awaitable[None]]) -> Callable[[Path], None]:
    """Run with a folder of its own."""

    def run(tmp_path: Path) -> None:
        asyncio.run(_within(function(tmp_path)))

    run.__doc__, run.__name__ = function.__doc__, function.__name__
    return run


@async_test
async def test_request_is_charged_and_exported(folder: Path) -> None:
    """Reserve, report, settle; a repeated end costs nothing; metrics follow."""
    life = await Life(folder).start()
    life.reserve("a", 60)
    assert await life.figures() == (0, 60)
    life.report("a", 10, 5)
    life.report("a", 10, 20, final=True)
    life.report("a", 10, 20, final=True)
    assert await life.figures() == (30, 0)
    assert life.exported("cortex_spend_tokens_total") == [30]
    assert life.exported("cortex_spend_prompt_tokens_total") == [10]
    with pytest.raises(InsufficientQuota):
        life.reserve("b", 71)
    assert life.exported("cortex_budget_refusals_total") == [1]
    await life.actor.on_stop()


@async_test
async def test_killed_owner_loses_nothing(folder: Path) -> None:
    """Without any farewell: spent stays spent, reserved stays reserved, ends still count."""
    first = await Life(folder).start()
    first.reserve("a", 30)
    first.report("a", 5, 5, final=True)
    first.reserve("b", 40)
    first.report("b", 7, 1)
    second = await Life(folder).start()
    assert await second.figures() == (10, 40)
    second.report("b", 7, 13, final=True)
    assert await second.figures() == (30, 0)
    third = await Life(folder).start()
    assert await third.figures() == (30, 0)


@async_test
async def test_dead_front_pays_what_it_had_reported(folder: Path) -> None:
    """Also one that died while the owner was away; nothing stays reserved."""
    life = await Life(folder).start()
    life.reserve("a", 40)
    life.report("a", 8, 2)
    life.actor.on_actor_down(ActorDown(9, "front.0", 1, "", 0, "killed"))
    assert await life.figures() == (10, 0)
    life.reserve("b", 40, front="front.1")
    second = await Life(folder).start()  # front.1 is not there any more
    assert await second.figures() == (10, 0)


@async_test
async def test_torn_line_costs_only_itself(folder: Path) -> None:
    """What a crash or a full disk left half-written is passed over."""
    life = await Life(folder).start()
    life.reserve("a", 30)
    life.report("a", 5, 5, final=True)
    journal = folder / "state" / "budgets.jsonl"
    journal.write_bytes(b'["x"]\n' + journal.read_bytes() + b'["r",1')
    second = await Life(folder).start()
    assert await second.figures() == (10, 0)


@async_test
async def test_nothing_is_granted_before_the_keys_are_known(folder: Path) -> None:
    """An unknown key would have no cap; a revoked one has no budget."""
    life = Life(folder)
    await life.actor.on_start()
    with pytest.raises(ServiceUnavailable):
        life.reserve("a", 1)
    with pytest.raises(ServiceUnavailable):
        life.report("a", 1, 1, final=True)
    other = Key(key_id="other", key_sha256=key_digest("o"))
    life.actor.on_keys_changed(KeysChanged([other]), envelope())
    with pytest.raises(InvalidApiKey):
        life.reserve("a", 1)


@async_test
async def test_gauges_follow_the_keys(folder: Path) -> None:
    """A change of the keys shows all budgets anew; an absent metrics actor harms nothing."""
    life = await Life(folder).start()
    life.peers.is_deaf = True
    life.reserve("a", 40)
    life.report("a", 1, 1, final=True)
    life.peers.is_deaf = False
    life.peers.told.clear()
    life.actor.on_actor_up(ActorUp(9, ActorInfo("metrics", 2, "ready")))
    assert life.exported("cortex_budget_spent_tokens") == [2]
    assert life.exported("cortex_budget_limit_tokens") == [100]
    life.peers.told.clear()
    life.actor.on_keys_changed(KeysChanged([]), envelope())
    assert life.exported("cortex_budget_spent_tokens") == []
