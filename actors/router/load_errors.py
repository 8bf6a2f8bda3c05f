"""What a request is told of a model that is loading, or could not be loaded, here or elsewhere."""

from __future__ import annotations

import math
from typing import Final

from actors.router.managed_model import ManagedModel
from cortexd.errors import CortexError, ModelLoadFailed, ModelLoading
from cortexd.messages import Loading

_DEFAULT_RETRY_AFTER_S: Final = 2.0
_MAX_RETRY_AFTER_S: Final = 60.0  # client SDKs ignore longer hints


def loading_error(model_id: str, state: str, loading: Loading) -> ModelLoading:
    """Return the answer for a request that does not wait for a loading model.

    `state` is what the model does, and where if not here.
    """
    eta_s = loading.eta_s
    return ModelLoading(
        f'model "{model_id}" is {state} ({loading.stage or "starting"}); '
        "retry later or stream to wait",
        retry_after_s=min(max(eta_s or _DEFAULT_RETRY_AFTER_S, 1.0), _MAX_RETRY_AFTER_S),
        progress=round(loading.progress or 0.0, 3),
        eta_s=None if eta_s is None else round(eta_s, 1),
    )


def load_failed(model: ManagedModel) -> CortexError:
    """Return the answer for a request to a model that could not be loaded and cools down."""
    cause = model.error
    assert cause is not None, "a failed model has an error"
    if not may_retry(cause):
        return cause
    return ModelLoadFailed(
        f'model "{model.options.model_id}" could not be loaded: {cause.message}',
        retry_after_s=min(math.ceil(model.cooldown_left_s), _MAX_RETRY_AFTER_S),
    )


def may_retry(error: CortexError | None) -> bool:
    """Tell whether loading again can help: a structural fault of the files cannot heal."""
    return error is None or error.http_status >= 500
