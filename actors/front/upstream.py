"""HTTP to the nodes that serve remote models: one client of one front, opened at its first use."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

import aiohttp
from multidict import CIMultiDict

from actors.front.auth import (
    ACCOUNT_HEADER,
    CREDENTIAL_HEADERS,
    IDENTITY_HEADERS,
    KEY_ID_HEADER,
    Principal,
)
from cortexd.errors import UpstreamUnavailable

_CONNECT_TIMEOUT_S: Final = 2.0
_IDLE_CONNECTION_S: Final = 15.0
# A neuron answers a stream's head within its hold; one that does not has accepted and forgotten.
HEAD_TIMEOUT_S: Final = 30.0

_HOP_BY_HOP: Final = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
# The body is sent decoded and whole; answers come plain, so that they can be followed.
_NOT_SENT: Final = (
    _HOP_BY_HOP
    | IDENTITY_HEADERS
    | {
        "accept-encoding",
        "content-encoding",
        "content-length",
        "expect",
        "host",
        "x-request-id",
    }
)
_NOT_RETURNED: Final = _HOP_BY_HOP | {
    "content-length",
    "date",
    "request-id",
    "server",
    "x-request-id",
}


class ConnectFailed(UpstreamUnavailable):
    """No connection came about: the node is down."""

    code = "upstream_unavailable"


class Upstream:
    """Post requests to nodes."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def post(
        self, node: str, url: str, headers: Mapping[str, str], body: bytes, head_timeout_s: float
    ) -> aiohttp.ClientResponse:
        """Return the answer as soon as its head is there; the caller closes it.

        Raises: ConnectFailed, UpstreamUnavailable. Not a byte was received then.
        """
        try:
            async with asyncio.timeout(head_timeout_s):
                return await self._client().post(
                    url,
                    data=body,
                    headers=headers,
                    allow_redirects=False,
                    skip_auto_headers=("Accept", "Content-Type", "User-Agent"),
                )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise ConnectFailed(
                f'node "{node}" cannot be reached: {_reason(error)}', retry_after_s=2
            ) from None
        except TimeoutError:
            raise UpstreamUnavailable(
                f'node "{node}" accepted the request and did not answer it within '
                f"{head_timeout_s:g} s",
                retry_after_s=2,
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamUnavailable(
                f'node "{node}" ended before it answered: {_reason(error)}', retry_after_s=2
            ) from None

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # No total time: long answers are not failures.
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_CONNECTION_S),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session


def request_headers(
    headers: Mapping[str, str], request_id: str, principal: Principal, own_key: str | None
) -> CIMultiDict[str]:
    """Return the client's headers as they go to a node.

    `own_key` is what this gateway shows the node in place of the client's key; None leaves the
    client's own to pass, "" shows none.
    """
    sent = _without(headers, _NOT_SENT if own_key is None else _NOT_SENT | CREDENTIAL_HEADERS)
    if own_key:
        sent["Authorization"] = f"Bearer {own_key}"
    if principal.account:
        sent[ACCOUNT_HEADER] = principal.account
        sent[KEY_ID_HEADER] = principal.key_id
    sent["Accept-Encoding"] = "identity"
    sent["x-request-id"] = request_id
    return sent


def response_headers(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """Return a node's headers as they go to the client."""
    return _without(headers, _NOT_RETURNED)


def _without(headers: Mapping[str, str], left_out: frozenset[str]) -> CIMultiDict[str]:
    named = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    return CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if name.lower() not in left_out and name.lower() not in named
    )


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
