"""Reads files again while the daemon runs, and tells those concerned: catalogue and API keys.

It looks once a second whether a file has changed, at SIGHUP (`ReloadFiles`) and when an operator
says `reload`. State: each file's last good value. A version with an error is logged with its line
and changes nothing. A receiver that restarts is told the value in force.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final

import msgspec

from actors.actor import AsyncActor, handles
from actors.watched_file import Reload, WatchedFile
from cortexd.catalogue_diff import catalogue_changes
from cortexd.demo import served_catalogue
from cortexd.errors import ActorDown, MailboxFull, NotFound
from cortexd.keys import key_changes, load_keys
from cortexd.log import event
from cortexd.messages import (
    ActorUp,
    AdminCommand,
    AdminReply,
    CatalogueChanged,
    KeysChanged,
    ReloadFiles,
)
from cortexd.messages.envelope import Envelope
from cortexd.settings import Settings

_PERIOD_S: Final = 1.0


class Reloader(AsyncActor):
    """Watch the files of these settings."""

    async def on_start(self) -> None:
        """Read all files once, then watch them."""
        self._files = watched_files(self.context.settings)
        self._looking = asyncio.Lock()
        for file in self._files:
            await asyncio.to_thread(file.look)
            if file.error is not None:
                event(self.log, f"{file.name}.rejected", 40, error=file.error)
            self._announce(file)
        self._watching = asyncio.create_task(self._watch_forever())

    async def on_stop(self) -> None:
        """Stop watching."""
        self._watching.cancel()

    def on_actor_up(self, up: ActorUp) -> None:
        """Tell a receiver that starts what is in force: it was started with older values."""
        for file in self._files:
            if file.is_for(up.actor.name):
                self._tell(up.actor.name, file)

    @handles(ReloadFiles)
    async def on_reload(self, message: ReloadFiles, envelope: Envelope) -> None:
        """Look at all files now."""
        await self._look_at(self._files)

    @handles(AdminCommand)
    async def on_admin(self, message: AdminCommand, envelope: Envelope) -> AdminReply:
        """Run `reload`: look at all files and answer what became of each."""
        if message.op != "reload" or message.args:
            raise NotFound(
                f'unknown operation "{message.op}"; the reloader knows reload, no arguments'
            )
        return AdminReply(msgspec.json.encode({"files": await self._look_at(self._files)}))

    async def _watch_forever(self) -> None:
        while True:
            await asyncio.sleep(_PERIOD_S)
            try:
                await self._look_at([file for file in self._files if file.has_changed])
            except Exception:
                event(self.log, "reloader.failed", 40, exc_info=True)

    async def _look_at(self, files: list[WatchedFile[Any]]) -> list[Reload]:
        async with self._looking:
            found = []
            for file in files:
                had_error = file.error
                reload = await asyncio.to_thread(file.look)
                found.append(reload)
                if reload.status == "rejected":
                    event(self.log, f"{file.name}.rejected", 40, error=reload.error)
                elif reload.status == "reloaded" or had_error is not None:
                    event(self.log, f"{file.name}.reloaded", changes=reload.changes)
                    self._announce(file)
            return found

    def _announce(self, file: WatchedFile[Any]) -> None:
        for peer in self.peers.all():
            if file.is_for(peer.name):
                self._tell(peer.name, file)

    def _tell(self, name: str, file: WatchedFile[Any]) -> None:
        if file.value is None:
            return
        try:
            self.tell(name, file.message(file.value))
        except (ActorDown, MailboxFull) as error:
            # One that restarts is told when it is up again.
            event(self.log, f"{file.name}.not_told", 30, actor=name, error=error.message)


def watched_files(settings: Settings) -> list[WatchedFile[Any]]:
    """Return the files that these settings name; those not configured are not watched."""
    files: list[WatchedFile[Any]] = []
    keys_file = settings.entitlements.keys_file
    if keys_file is not None:
        files.append(
            WatchedFile(
                name="keys",
                path=Path(keys_file),
                read=lambda: load_keys(keys_file),
                changes=key_changes,
                message=lambda keys: KeysChanged(keys.keys),
                receivers=("budgets", "front."),
            )
        )
    if settings.models_config is not None:
        files.append(
            WatchedFile(
                name="catalogue",
                path=Path(settings.models_config),
                read=lambda: served_catalogue(settings),
                changes=catalogue_changes,
                message=CatalogueChanged,
                receivers=("router",),
            )
        )
    return files
