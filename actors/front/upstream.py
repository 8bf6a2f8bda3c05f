"""HTTP to the nodes that serve remote models: requests out, connections kept for the next ones.

One pool of one front. The client is our own because a general one costs a relay more than all the
rest of a request; what it does is HTTP/1.1 with keep-alive, one request a connection at a time.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Final, NamedTuple
from urllib.parse import unquote, urlsplit

from actors.front.auth import (
    ACCOUNT_HEADER,
    CREDENTIAL_HEADERS,
    IDENTITY_HEADERS,
    KEY_ID_HEADER,
    Principal,
)
from actors.front.node_connection import NodeAnswer, NodeConnection
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
# Which pages may use this gateway is for it to say.
_NOT_RETURNED: Final = _HOP_BY_HOP | {
    "access-control-allow-credentials",
    "access-control-allow-origin",
    "access-control-expose-headers",
    "content-length",
    "date",
    "request-id",
    "server",
    "x-request-id",
}


class ConnectFailed(UpstreamUnavailable):
    """No connection came about: the node is down."""

    code = "upstream_unavailable"


class Origin(NamedTuple):
    """Where a node listens, and how requests are addressed there."""

    host: str
    port: int
    is_tls: bool
    path: str  # what stands before every path
    host_header: str
    authorization: str  # from the endpoint's user and password, "" without them


@lru_cache
def origin_of(base_url: str) -> Origin:
    """Return the origin of an endpoint that has been checked."""
    url = urlsplit(base_url)
    is_tls = url.scheme == "https"
    assert url.hostname is not None, "an endpoint has a host"
    authorization = ""
    if url.username is not None:
        user = f"{unquote(url.username)}:{unquote(url.password or '')}"
        authorization = "Basic " + base64.b64encode(user.encode()).decode()
    return Origin(
        url.hostname,
        url.port or (443 if is_tls else 80),
        is_tls,
        url.path,
        url.netloc.rpartition("@")[2],
        authorization,
    )


class Upstream:
    """Post requests to nodes."""

    def __init__(self) -> None:
        self._idle: dict[Origin, list[NodeConnection]] = {}
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._trust: ssl.SSLContext | None = None

    def __repr__(self) -> str:
        return f"Upstream({sum(map(len, self._idle.values()))} idle)"

    async def send(
        self, node: str, base_url: str, path: str, fields: list[tuple[str, str]], body: bytes
    ) -> NodeAnswer:
        """Return the answer to come to a request that is on its way; the caller closes it.

        Raises: ConnectFailed.
        """
        if self.has_idle(base_url):
            return self.send_idle(base_url, path, fields, body)
        origin = origin_of(base_url)
        connection = await self._connect(node, origin)
        return connection.send(request_bytes(origin, path, fields, body))

    def has_idle(self, base_url: str) -> bool:
        """Tell whether a connection is idle, over which `send_idle` sends at once."""
        connections = self._idle.get(origin_of(base_url))
        while connections and connections[-1].is_lost:
            connections.pop()
        return bool(connections)

    def send_idle(
        self, base_url: str, path: str, fields: list[tuple[str, str]], body: bytes
    ) -> NodeAnswer:
        """Do the same over the connection that was used last.

        The node has had the least time to close that one.
        """
        origin = origin_of(base_url)
        return self._idle[origin].pop().send(request_bytes(origin, path, fields, body))

    def close(self) -> None:
        """Close the connections that are idle; the others end with their requests."""
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        for connections in self._idle.values():
            for connection in connections:
                connection.abort()
        self._idle.clear()

    async def _connect(self, node: str, origin: Origin) -> NodeConnection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    lambda: NodeConnection(lambda freed: self._keep(origin, freed)),
                    origin.host,
                    origin.port,
                    ssl=self._trusted() if origin.is_tls else None,
                )
        except TimeoutError:
            what = f"no connection within {_CONNECT_TIMEOUT_S:g} s"
        except OSError as error:
            what = str(error) or type(error).__name__
        else:
            return connection
        raise ConnectFailed(f'node "{node}" cannot be reached: {what}', retry_after_s=2)

    def _trusted(self) -> ssl.SSLContext:
        """Return the certificates that the host trusts; they take tens of milliseconds to read."""
        if self._trust is None:
            self._trust = ssl.create_default_context()
        return self._trust

    def _keep(self, origin: Origin, connection: NodeConnection) -> None:
        connection.idle_since = time.monotonic()
        self._idle.setdefault(origin, []).append(connection)
        if self._sweep_timer is None:
            self._sweep_timer = asyncio.get_running_loop().call_later(
                _IDLE_CONNECTION_S, self._sweep
            )

    def _sweep(self) -> None:
        """Close what nobody has wanted for long."""
        self._sweep_timer = None
        now = time.monotonic()
        for origin, connections in list(self._idle.items()):
            del self._idle[origin]
            for connection in connections:
                if connection.is_lost:
                    continue
                if now - connection.idle_since >= _IDLE_CONNECTION_S:
                    connection.abort()
                else:
                    self._idle.setdefault(origin, []).append(connection)
        if self._idle:
            self._sweep_timer = asyncio.get_running_loop().call_later(
                _IDLE_CONNECTION_S / 3, self._sweep
            )


def request_bytes(origin: Origin, path: str, fields: list[tuple[str, str]], body: bytes) -> bytes:
    """Return a whole request."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in fields])
    if origin.authorization and "\nauthorization:" not in f"\n{lines.lower()}":
        lines += f"Authorization: {origin.authorization}\r\n"
    return (
        f"POST {origin.path}{path} HTTP/1.1\r\nHost: {origin.host_header}\r\n"
        f"{lines}Content-Length: {len(body)}\r\n\r\n"
    ).encode("utf-8", "surrogateescape") + body


def request_headers(
    headers: Mapping[str, str], request_id: str, principal: Principal, own_key: str | None
) -> list[tuple[str, str]]:
    """Return the client's headers as they go to a node.

    `own_key` is what this gateway shows the node in place of the client's key; None leaves the
    client's own to pass, "" shows none.
    """
    sent = _without(headers, _NOT_SENT if own_key is None else _NOT_SENT | CREDENTIAL_HEADERS)
    if own_key:
        sent.append(("Authorization", f"Bearer {own_key}"))
    if principal.account:
        sent += [(ACCOUNT_HEADER, principal.account), (KEY_ID_HEADER, principal.key_id)]
    sent += [("Accept-Encoding", "identity"), ("x-request-id", request_id)]
    return sent


def returned_fields(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return a node's headers as they go to the client."""
    return _without(headers, _NOT_RETURNED)


def _without(headers: Mapping[str, str], left_out: frozenset[str]) -> list[tuple[str, str]]:
    connection = headers.get("Connection")
    if connection is not None:
        left_out |= {name.strip().lower() for name in connection.split(",")}
    return [pair for pair in headers.items() if pair[0].lower() not in left_out]
