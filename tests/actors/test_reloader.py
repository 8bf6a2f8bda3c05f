"""Files that are read again: what is told to whom, and what a bad version changes."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from actors.actor import ActorContext
from actors.registry import Registry
from actors.reloader import Reloader
from cortexd.catalogue import Catalogue, CatalogueModel
from cortexd.catalogue_diff import catalogue_changes
from cortexd.messages import ActorUp, AdminCommand, CatalogueChanged, ReloadFiles
from cortexd.messages.control import ActorInfo, Message
from cortexd.settings import Settings
from tests.doubles.router_world import envelope
from tests.waiting import DEADLINE_S

GOOD = '[[models]]\nid = "org/a"\n'


class Peers:
    """A runtime that keeps what is told."""

    def __init__(self) -> None:
        self.peers = Registry()
        self.told: list[tuple[str, Message]] = []
        self.has_told = asyncio.Event()
        for name in ("router", "evictor", "poller"):
            self.bring_up(name)

    def bring_up(self, name: str) -> ActorUp:
        """Make an actor ready."""
        up = ActorUp(self.peers.sequence + 1, ActorInfo(name, 1, "ready"))
        self.peers.apply(up)
        return up

    def tell(self, name: str, body: Message) -> None:
        """Keep a message."""
        self.told.append((name, body))
        self.has_told.set()

    def catalogues(self, name: str) -> list[list[str]]:
        """Return the model ids of each catalogue an actor was told."""
        return [
            [model.id for model in body.catalogue.models]
            for receiver, body in self.told
            if receiver == name and isinstance(body, CatalogueChanged)
        ]

    async def ask(self, name: str, body: Message, *, deadline_s: float) -> Message:
        """Not used by the reloader."""
        raise AssertionError(name)

    async def wait_for(self, name: str, *, deadline_s: float) -> ActorInfo:
        """Not used by the reloader."""
        raise AssertionError(name)

    def report_progress(self, fraction: float, stage: str) -> None:
        """Not used by the reloader."""


async def started(path: Path) -> tuple[Reloader, Peers]:
    """Start a reloader that watches a catalogue."""
    context = ActorContext(
        name="reloader",
        incarnation=1,
        settings=Settings(models_config=str(path)),
        args=b"",
        listeners={},
        log=logging.getLogger("test"),
        runtime_dir=path.parent,
    )
    reloader, peers = Reloader(context), Peers()
    reloader.attach(peers)
    await reloader.on_start()
    return reloader, peers


async def asked(reloader: Reloader) -> dict[str, Any]:
    """Run `reload` as an operator; return the only file's entry."""
    reply = await reloader.on_admin(AdminCommand("op-1", "reload", {}), envelope())
    (file,) = msgspec.json.decode(reply.result)["files"]
    assert isinstance(file, dict)
    return file


def test_change_is_told_and_a_bad_version_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The difference is shown, the error names file and line, a restarted router gets the value."""
    path = tmp_path / "models.toml"
    path.write_text(GOOD)

    async def work() -> None:
        reloader, peers = await started(path)
        assert peers.catalogues("router") == [["org/a"]]
        assert (await asked(reloader))["status"] == "unchanged"
        path.write_text(GOOD + '[[models]]\nid = "org/b"\n')
        file = await asked(reloader)
        assert (file["status"], file["changes"]) == ("reloaded", ['+ model "org/b"'])
        assert peers.catalogues("router")[-1] == ["org/a", "org/b"]
        path.write_text(GOOD + "[[models]]\nidd = 3\n")
        with caplog.at_level(logging.ERROR):
            await reloader.on_reload(ReloadFiles(), envelope())
        assert "catalogue.rejected" in caplog.text
        file = await asked(reloader)
        assert file["status"] == "rejected"
        assert f"{path}:4" in file["error"]
        peers.told.clear()
        reloader.on_actor_up(peers.bring_up("router"))
        assert peers.catalogues("router") == [["org/a", "org/b"]]
        assert {name for name, _ in peers.told} == {"router"}
        await reloader.on_stop()

    asyncio.run(work())


def test_changed_file_is_noticed_without_being_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it is replaced by another file of the same size."""
    monkeypatch.setattr("actors.reloader._PERIOD_S", 0.01)
    path = tmp_path / "models.toml"
    path.write_text(GOOD)

    async def work() -> None:
        reloader, peers = await started(path)
        peers.has_told.clear()
        other = tmp_path / "new"
        other.write_text(GOOD.replace("/a", "/b"))
        os.replace(other, path)
        async with asyncio.timeout(DEADLINE_S):
            await peers.has_told.wait()
        assert peers.catalogues("router")[-1] == ["org/b"]
        await reloader.on_stop()

    asyncio.run(work())


def test_difference_names_each_key() -> None:
    """Models and aliases that came, went or changed."""
    old = Catalogue(
        models=[CatalogueModel(id="o/a", vram_mb=5), CatalogueModel(id="o/gone")],
        aliases={"x": "o/a", "y": "o/a"},
    )
    new = Catalogue(
        models=[CatalogueModel(id="o/a", pinned_on=["n"]), CatalogueModel(id="o/new")],
        aliases={"x": "o/new", "z": "o/a"},
    )
    assert catalogue_changes(old, old) == []
    assert catalogue_changes(old, new) == [
        '+ model "o/new"',
        '- model "o/gone"',
        '~ model "o/a" vram_mb: 5 -> unset',
        '~ model "o/a" pinned_on: [] -> ["n"]',
        '~ alias "x": "o/a" -> "o/new"',
        '- alias "y" = "o/a"',
        '+ alias "z" = "o/a"',
    ]
