"""The model store: brings model files to local disk and reads what they are before anyone loads.

Asked by the router (`ResolveFiles`) and by operators (`model.pull`). One resolution per model runs
at a time, however many ask; downloads run in threads, report progress, and end when the actor is
stopped. A failed resolution leaves nothing behind that looks complete (see `engine.sources`).
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import msgspec

from actors.actor import AsyncActor, handles
from actors.operation_report import report_operation
from cortexd.errors import (
    ActorDown,
    CortexError,
    Internal,
    InvalidRequest,
    MailboxFull,
    NotFound,
)
from cortexd.log import event
from cortexd.messages import (
    AdminCommand,
    AdminReply,
    ResolvedFiles,
    ResolveFiles,
    ResolveProgress,
)
from cortexd.messages.envelope import Envelope
from cortexd.paths import cache_dir

_PROGRESS_PERIOD_S = 0.25
Key = tuple[str, str | None]


class PullArgs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Arguments of the admin operation `model.pull`."""

    model_id: str
    quant: str | None = None


class Resolution:
    """One running resolution and those who want to hear of its progress."""

    def __init__(self, task: asyncio.Task[ResolvedFiles], cancel: threading.Event) -> None:
        self.task = task
        self.cancel = cancel
        self.listeners: dict[str, str] = {}  # actor name, or admin operation id → kind
        self.reported_at = 0.0


class Store(AsyncActor):
    """Resolve model ids to files, single flight."""

    async def on_start(self) -> None:
        """Start with nothing running; the cache on disk is the only state."""
        self._resolutions: dict[Key, Resolution] = {}
        self._operations: set[asyncio.Task[None]] = set()

    async def on_stop(self) -> None:
        """Cancel running downloads; their temporary files are removed by the source."""
        for resolution in self._resolutions.values():
            resolution.cancel.set()

    @handles(ResolveFiles)
    async def on_resolve_files(self, message: ResolveFiles, envelope: Envelope) -> ResolvedFiles:
        """Resolve and answer; progress goes to the asking actor meanwhile."""
        return await self._resolve(message.model_id, message.quant, envelope.src.name, "actor")

    @handles(AdminCommand)
    async def on_admin(self, message: AdminCommand, envelope: Envelope) -> AdminReply:
        """Start `model.pull`; its end is reported to the root."""
        if message.op != "model.pull":
            raise NotFound(f'unknown operation "{message.op}"; the store knows model.pull')
        arguments = msgspec.convert(
            {name: msgspec.json.decode(raw) for name, raw in message.args.items()}, type=PullArgs
        )
        if self.context.settings.role == "gateway":
            raise InvalidRequest(
                f'this gateway runs no models; pull "{arguments.model_id}" on the host that is to '
                "run it"
            )
        task = asyncio.create_task(self._pull(message.operation_id, arguments))
        self._operations.add(task)
        task.add_done_callback(self._operations.discard)
        return AdminReply(msgspec.json.encode({"accepted": True}))

    async def _pull(self, operation_id: str, arguments: PullArgs) -> None:
        try:
            resolved = await self._resolve(
                arguments.model_id, arguments.quant, operation_id, "operation"
            )
        except CortexError as error:
            report_operation(self, operation_id, "failed", error.to_info())
            return
        report_operation(self, operation_id, "done", resolved.files)

    async def _resolve(
        self, model_id: str, quant: str | None, listener: str, kind: str
    ) -> ResolvedFiles:
        key = (model_id, quant)
        resolution = self._resolutions.get(key)
        if resolution is None:
            cancel = threading.Event()
            task = asyncio.create_task(self._run(key, cancel))
            resolution = Resolution(task, cancel)
            self._resolutions[key] = resolution
            task.add_done_callback(lambda _: self._resolutions.pop(key, None))
        resolution.listeners[listener] = kind
        # A caller that goes away must not end the download of the others.
        return await asyncio.shield(resolution.task)

    async def _run(self, key: Key, cancel: threading.Event) -> ResolvedFiles:
        loop = asyncio.get_running_loop()

        def progress(stage: str, done_bytes: int, total_bytes: int) -> None:
            loop.call_soon_threadsafe(self._progress, key, stage, done_bytes, total_bytes)

        model_id, quant = key
        started = time.monotonic()
        try:
            resolved = await asyncio.to_thread(self._resolve_blocking, key, progress, cancel)
        except CortexError:
            raise
        except Exception as error:
            event(self.log, "store.resolve_failed", 40, exc_info=True, model=model_id)
            raise Internal(f'model "{model_id}" could not be resolved: {error!r}') from error
        event(
            self.log,
            "store.resolved",
            model=model_id,
            quant=quant,
            format=resolved.files.format,
            size_bytes=resolved.files.size_bytes,
            seconds=round(time.monotonic() - started, 3),
        )
        return resolved

    def _resolve_blocking(self, key: Key, progress: Any, cancel: threading.Event) -> ResolvedFiles:
        from engine.preflight import inspect_and_weigh
        from engine.sources import resolve

        settings = self.context.settings.store
        files = resolve(key[0], key[1], settings, cache_dir(settings), progress, cancel)
        return ResolvedFiles(files, *inspect_and_weigh(files))

    def _progress(self, key: Key, stage: str, done_bytes: int, total_bytes: int) -> None:
        resolution = self._resolutions.get(key)
        now = time.monotonic()
        if resolution is None or now - resolution.reported_at < _PROGRESS_PERIOD_S:
            return
        resolution.reported_at = now
        message = ResolveProgress(key[0], stage, done_bytes, total_bytes)
        for listener, kind in resolution.listeners.items():
            if kind == "operation":
                report_operation(self, listener, "progress", message)
                continue
            try:
                self.tell(listener, message)
            except (ActorDown, MailboxFull):
                continue  # progress is advisory; the answer itself is not
