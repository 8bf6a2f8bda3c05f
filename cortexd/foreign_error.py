"""What another OpenAI-compatible server's error means, in our own classes. Pure.

Servers agree on the HTTP status and on `{"error": {"message": ...}}`; codes and types differ. An
overlong prompt is told by its words, since agents act on it.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from cortexd.errors import (
    ERRORS_BY_CODE,
    ContextLengthExceeded,
    CortexError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    RequestTooLarge,
    UpstreamError,
)

# The words of vLLM, SGLang and llama-server.
_TOO_LONG: Final = re.compile(
    r"maximum context length|exceeds? the available context size|longer than the model's context",
    re.IGNORECASE,
)
_BY_STATUS: Final[dict[int, type[CortexError]]] = {
    400: InvalidRequest,
    404: ModelNotFound,
    413: RequestTooLarge,
    422: InvalidRequest,
    429: Overloaded,
    503: Overloaded,
}


def foreign_error(
    node: str, status: int, body: bytes, retry_after_s: float | None = None
) -> CortexError:
    """Return the error that the server's answer stands for."""
    fields = _fields(body)
    message = str(fields.get("message") or "") or f"HTTP {status} without an error object"
    text = f'node "{node}": {message}'
    if _TOO_LONG.search(message):
        return ContextLengthExceeded(f"prompt is too long: {text}")
    error_class = ERRORS_BY_CODE.get(str(fields.get("code"))) or _BY_STATUS.get(status)
    if error_class is None:
        return UpstreamError(text)
    return error_class(text, retry_after_s=retry_after_s if error_class.retriable else None)


def _fields(body: bytes) -> dict[str, object]:
    try:
        document = msgspec.json.decode(body, type=dict[str, object])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    error = document.get("error")
    return error if isinstance(error, dict) else {"message": error}
