"""What `cortexd start` shows after it is ready: how far its models are, until each is loaded.

The root writes its log to a file, so this thread is the terminal's only news of a download or a
failed load. It asks the daemon's own admin socket, like `cortexd status`, and ends with the last
model; it is a daemon thread, so it never holds up the end of the process.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final, TextIO

from cli import control
from cli import format as fmt
from cli.control import Document
from cli.exit_code import CommandError
from cli.models import documents, progress_text
from cortexd.errors import CortexError
from cortexd.settings import Settings

_POLL_PERIOD_S: Final = 0.5
_LINE_PERIOD_S: Final = 5.0  # between progress lines where there is no terminal
_SETTLED: Final = frozenset({"loaded", "failed"})


def watch_models(settings: Settings) -> None:
    """Start the thread."""
    threading.Thread(target=_watch, args=(settings,), name="model-watch", daemon=True).start()


def _watch(settings: Settings) -> None:
    wanted = {model.model_id for model in settings.default_models}
    view = ModelView(wanted, sys.stderr, time.monotonic)
    try:
        with control.connected(settings) as channel:
            while not view.is_settled:
                view.show(documents(channel.request("status", {}).get("models")))
                time.sleep(_POLL_PERIOD_S)
    except (CortexError, CommandError) as error:
        # The daemon itself goes on, or is being stopped; this was only the view of it.
        view.note(f"progress is not shown any more: {error}")


class ModelView:
    """Turns looks at the models into lines: in place on a terminal, else one now and then."""

    def __init__(self, wanted: Iterable[str], stream: TextIO, clock: Callable[[], float]) -> None:
        self._waiting = dict.fromkeys(wanted, "")  # model id → what was last shown
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._clock = clock
        self._started = self._last_line = clock()

    @property
    def is_settled(self) -> bool:
        """Whether every wanted model is loaded or has failed."""
        return not self._waiting

    def show(self, models: Iterable[Document]) -> None:
        """Show what is new since the last look."""
        for model in models:
            model_id = str(model.get("model_id"))
            if model_id not in self._waiting:
                continue
            if model.get("state") in _SETTLED:
                del self._waiting[model_id]
                self.note(self._ending(model_id, model))
            elif model.get("stage"):
                self._progress(model_id, model)

    def note(self, text: str) -> None:
        """Write a line that stays."""
        clear = "\r\x1b[2K" if self._is_terminal else ""
        self._write(f"{clear}{fmt.printable(text)}\n")

    def _progress(self, model_id: str, model: Document) -> None:
        text = progress_text(model)
        stage = str(model.get("stage"))
        if self._is_terminal:
            self._write(f"\r\x1b[2K{fmt.printable(f'{model_id}: {text}')}")
            return
        now = self._clock()
        if stage != self._waiting[model_id] or now - self._last_line >= _LINE_PERIOD_S:
            self._waiting[model_id] = stage
            self._last_line = now
            self.note(f"{model_id}: {text}")

    def _ending(self, model_id: str, model: Document) -> str:
        if model.get("state") == "failed":
            return f"{model_id}: failed: {model.get('error') or 'see: cortexd logs'}"
        return f"{model_id}: loaded after {fmt.duration(self._clock() - self._started)}"

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._waiting.clear()  # nobody reads: the terminal is gone
