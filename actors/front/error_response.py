"""Errors as HTTP: the dialect's envelope and status, and Retry-After where a retry can help."""

from __future__ import annotations

import math

import msgspec
from aiohttp import web

from actors.front.not_found import no_route
from cortexd.anthropic import error_document, error_status
from cortexd.errors import (
    CortexError,
    Internal,
    InvalidApiKey,
    InvalidRequest,
    MethodNotAllowed,
    RateLimitExceeded,
    RequestTooLarge,
)

_DEFAULT_RETRY_AFTER_S = 2.0
# The official SDKs ignore a Retry-After above 60 s.
_MAX_RETRY_AFTER_S = 60
_MESSAGES = "/v1/messages"
_VERSION_HEADER = "anthropic-version"
# Names the error's class in both dialects: the other one's envelope has no field for it, and a
# gateway in front of this host goes by it.
CODE_HEADER = "x-cortexd-error"


def envelope(error: CortexError) -> bytes:
    """Return `{"error": {...}}`; the error's details stand inside the object."""
    body: dict[str, object] = dict(error.details)
    # After the details: an error's own fields win over a detail of the same name.
    body |= {
        "message": error.message,
        "type": error.type,
        "code": error.code,
        "param": error.param,
    }
    return msgspec.json.encode({"error": body})


def retry_after_s(error: CortexError) -> int | None:
    """Return whole seconds for the Retry-After header, None for errors no retry will mend."""
    if error.retry_after_s is None and not error.retriable:
        return None
    wanted = _DEFAULT_RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
    seconds = max(math.ceil(wanted), 1)
    # A window's end is a fact: a client that comes back before it is refused again.
    return seconds if isinstance(error, RateLimitExceeded) else min(seconds, _MAX_RETRY_AFTER_S)


def error_response(error: CortexError) -> web.Response:
    """Return the HTTP answer of an error, in OpenAI's envelope."""
    return _with_hints(error, error.http_status, envelope(error))


def anthropic_error_response(error: CortexError, request_id: str) -> web.Response:
    """Return the HTTP answer of an error, in Anthropic's envelope."""
    body = msgspec.json.encode(error_document(error, request_id))
    return _with_hints(error, error_status(error), body)


def speaks_anthropic(request: web.BaseRequest) -> bool:
    """Tell whether the client expects Anthropic's shapes, where a path serves both kinds."""
    if request.path == _MESSAGES or request.path.startswith(_MESSAGES + "/"):
        return True
    return _VERSION_HEADER in request.headers and not request.path.endswith("/completions")


def set_request_id(response: web.StreamResponse, request_id: str) -> None:
    """Name the request under both dialects' headers."""
    response.headers["x-request-id"] = response.headers["request-id"] = request_id


def _with_hints(error: CortexError, status: int, body: bytes) -> web.Response:
    response = web.Response(status=status, body=body, content_type="application/json")
    response.headers[CODE_HEADER] = error.code
    seconds = retry_after_s(error)
    if seconds is not None:
        response.headers["Retry-After"] = str(seconds)
    if isinstance(error, InvalidApiKey):
        response.headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, MethodNotAllowed) and error.details.get("allowed"):
        response.headers["Allow"] = str(error.details["allowed"])
    return response


def from_http_exception(exception: web.HTTPException, request: web.Request) -> CortexError:
    """Return our error for one of the HTTP library's."""
    if isinstance(exception, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(exception.allowed_methods))
        return MethodNotAllowed(
            f"{request.method} is not allowed on {request.path}; allowed: {allowed}",
            allowed=allowed,
        )
    if isinstance(exception, web.HTTPNotFound):
        return no_route(request)
    if isinstance(exception, web.HTTPRequestEntityTooLarge):
        return RequestTooLarge("the request body is over the limit")
    if exception.status < 500:
        return InvalidRequest(f"the HTTP request is not usable: {exception.reason}")
    return Internal(f"the server failed: {exception.reason}")
