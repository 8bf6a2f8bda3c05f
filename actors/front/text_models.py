"""The text side of the models this front serves: a small cache of tokenizers and templates.

A text model is loaded once per set of files, in a thread, however many requests want it; the least
recently used are dropped. A failed load is not remembered: the next request tries again.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from cortexd.models import ModelFiles

if TYPE_CHECKING:
    from engine.text.text_model import TextModel

MAX_TEXT_MODELS = 8


Loader = Callable[[ModelFiles], "TextModel"]


def load_text_model(files: ModelFiles) -> TextModel:
    """Load tokenizer and template from disk (blocking)."""
    # Imported on first use: tokenizers and jinja2 would slow the start of every front.
    from engine.text.text_model import TextModel

    return TextModel.load(files)


class TextModels:
    """Cache of text models by their files."""

    def __init__(self, loader: Loader = load_text_model, max_models: int = MAX_TEXT_MODELS) -> None:
        self._loader = loader
        self._max_models = max_models
        self._loading: OrderedDict[ModelFiles, asyncio.Task[TextModel]] = OrderedDict()

    async def get(self, files: ModelFiles) -> TextModel:
        """Return the text model of these files. Raises: what its loader raises."""
        # Shielded: one client that leaves does not end the load for the others.
        return await asyncio.shield(self._begin(files))

    def prepare(self, files: ModelFiles) -> None:
        """Begin to load a text model that somebody will want soon; nobody waits for it."""
        self._begin(files).add_done_callback(_retrieve)

    def _begin(self, files: ModelFiles) -> asyncio.Task[TextModel]:
        task = self._loading.get(files)
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            task = asyncio.create_task(asyncio.to_thread(self._loader, files))
            self._loading[files] = task
        self._loading.move_to_end(files)
        while len(self._loading) > self._max_models:
            self._loading.popitem(last=False)
        return task


def _retrieve(task: asyncio.Task[TextModel]) -> None:
    """Take a failure for seen: the first request that needs the model tries again, and tells it."""
    if not task.cancelled():
        task.exception()
