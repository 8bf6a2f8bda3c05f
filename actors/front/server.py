"""Serves the applications on the sockets the root bound, until they are drained.

The root keeps its own copy of each socket: while this front restarts, connections wait in the
kernel's queue and none is refused.
"""

from __future__ import annotations

import asyncio
import socket
from functools import partial

from aiohttp import web

from actors.connection_share import ConnectionShare
from actors.front.acceptor import Acceptor
from actors.front.app import Listener
from actors.front.connection import Connection
from actors.front.services import Services

_KEEPALIVE_S = 75.0
# A body that nobody wants (413) is read for this long, so that the client sees the answer.
_LINGER_S = 5.0
_BACKLOG = 512
_CLEANUP_S = 1.0


class Server:
    """The HTTP servers of one front, by listener name."""

    def __init__(self, services: Services, share: ConnectionShare | None = None) -> None:
        """Serve; `share` is that of the connections, where there are several fronts."""
        self._services = services
        self._share = share
        self._runners: list[web.AppRunner] = []
        self._accepting: list[asyncio.Server | Acceptor] = []

    async def start(self, listeners: dict[str, socket.socket]) -> None:
        """Accept on every listener that this role has."""
        for name in ("api", "neuron"):
            if name in listeners:
                await self._serve(name, listeners[name])

    async def _serve(self, name: str, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        routes = Listener(self._services, name)
        runner = web.AppRunner(
            routes.app,
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=_CLEANUP_S,
        )
        await runner.setup()
        assert runner.server is not None, "set up above"
        routes.shorten(runner.server)
        # Not SockSite: it would make the library's own connections, which have no head deadline.
        protocol = partial(
            Connection,
            runner.server,
            loop=loop,
            access_log=None,
            keepalive_timeout=_KEEPALIVE_S,
            lingering_time=_LINGER_S,
            on_lost=None if self._share is None else self._share.closed,
        )
        self._runners.append(runner)
        accepting: asyncio.Server | Acceptor
        if self._share is not None:
            accepting = Acceptor(listener, protocol, self._share)
        else:
            accepting = await loop.create_server(protocol, sock=listener, backlog=_BACKLOG)
        self._accepting.append(accepting)

    def stop_accepting(self) -> None:
        """Leave new connections to other fronts, or to the kernel's queue."""
        if self._share is not None:
            self._share.leave()
        for accepting in self._accepting:
            accepting.close()
        self._accepting.clear()

    async def close(self) -> None:
        """Close every connection."""
        self.stop_accepting()
        for runner in self._runners:
            await runner.cleanup()
        self._runners.clear()
        self._services.upstream.close()
