"""What the metrics hear of loads: how they end, how long their stages take, what is unloaded."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from actors.router.managed_model import ManagedModel
from cortexd.metrics import EVICTIONS, LOAD_SECONDS, LOADS, UNKNOWN_MODEL

if TYPE_CHECKING:
    from actors.router.router import Router


class LoadMetrics:
    """Tells them with the model's name and this node's."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def loaded(self, model: ManagedModel, load_s: float) -> None:
        """Count a load that succeeded; `load_s` is what its engine took."""
        self._ended(model, "loaded")
        self._took(model, "start", load_s)

    def woken(self, model: ManagedModel, wake_s: float) -> None:
        """Count a wake that succeeded; `wake_s` is how long it was waited for."""
        self._ended(model, "woken")
        self._took(model, "wake", wake_s)

    def failed(self, model: ManagedModel) -> None:
        """Count a load that failed."""
        self._ended(model, "failed")

    def evicted(self, model: ManagedModel, reason: str) -> None:
        """Count a model that has left its device."""
        self._router.measure(EVICTIONS.sample(1, reason=reason, **self._labels(model)))

    @contextlib.contextmanager
    def stage(self, model: ManagedModel, name: str) -> Iterator[None]:
        """Tell how long a stage of a load took, unless it fails."""
        started = time.monotonic()
        yield
        self._took(model, name, time.monotonic() - started)

    def _ended(self, model: ManagedModel, result: str) -> None:
        self._router.measure(LOADS.sample(1, result=result, **self._labels(model)))

    def _took(self, model: ManagedModel, stage: str, seconds: float) -> None:
        self._router.measure(LOAD_SECONDS.sample(seconds, stage=stage, **self._labels(model)))

    def _labels(self, model: ManagedModel) -> dict[str, str]:
        # An id that nobody configured and that has no files may be anybody's invention.
        exists = model.is_known or model.files is not None
        model_id = model.options.model_id if exists else UNKNOWN_MODEL
        return {"model": model_id, "node": self._router.node_name}
