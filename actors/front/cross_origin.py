"""Which web pages of other origins may use the API from a browser (CORS).

A browser asks first (OPTIONS) and hands the answer to the page only where it is told that it may.
Without an answer of ours no page of another origin gets one, as it should be by default: any page
that a user opens could else use, and read, the models of their machine.
Source: https://fetch.spec.whatwg.org/#http-cors-protocol
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from aiohttp import web

from cortexd.errors import MethodNotAllowed

HeaderFields = tuple[tuple[str, str], ...]
# What a head has for the page that asks: nothing for most.
ORIGIN_FIELDS: web.RequestKey[HeaderFields] = web.RequestKey("origin_fields", tuple)

_ANY: Final = "*"
_NONE: Final[HeaderFields] = ()
_ASKED_METHOD: Final = "Access-Control-Request-Method"
_ASKED_HEADERS: Final = "Access-Control-Request-Headers"
_MAX_AGE_S: Final = 600
# What a page may read of a head beside the body's own fields.
_EXPOSED: Final = "x-request-id, request-id, retry-after, x-cortexd-error"


class CrossOrigin:
    """The rule of one listener; `allowed` are origins, or "*" for any."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = frozenset(origin.lower() for origin in allowed)

    def fields(self, request: web.Request) -> HeaderFields:
        """Return what the head of the answer says to the browser."""
        origin = request.headers.get("Origin") if self._allowed else None
        if origin is None:
            return _NONE
        if _ANY in self._allowed:
            return (
                ("Access-Control-Allow-Origin", _ANY),
                ("Access-Control-Expose-Headers", _EXPOSED),
            )
        if origin.lower() not in self._allowed:
            return _NONE
        return (
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Expose-Headers", _EXPOSED),
            ("Vary", "Origin"),
        )

    def preflight(self, request: web.Request) -> web.Response | None:
        """Return the answer to a browser's question, None for a request that is none.

        It carries no key, and asks before it sends one. Raises: MethodNotAllowed.
        """
        if request.method != "OPTIONS" or _ASKED_METHOD not in request.headers:
            return None
        if not request[ORIGIN_FIELDS]:
            origin = request.headers.get("Origin", "")[:200]
            raise MethodNotAllowed(
                f'pages of "{origin}" may not use this API; gateway.allowed_origins names who may'
            )
        return web.Response(
            status=204,
            headers={
                "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
                "Access-Control-Allow-Headers": request.headers.get(_ASKED_HEADERS, _ANY),
                "Access-Control-Max-Age": str(_MAX_AGE_S),
            },
        )
