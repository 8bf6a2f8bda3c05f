"""Finds the node of a request and posts it there: once more elsewhere if the first one fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, Final

import aiohttp
import msgspec
from aiohttp import web

from actors.front.model_value import with_model
from actors.front.record import RequestRecord
from actors.front.routing import place
from actors.front.services import REQUEST_ID, SERVICES
from actors.front.upstream import HEAD_TIMEOUT_S, ConnectFailed, request_headers
from cortexd.affinity import prefix_chain
from cortexd.errors import CortexError, InvalidRequest, UpstreamUnavailable
from cortexd.messages import (
    EndRequest,
    NodeFailed,
    NodeView,
    Place,
    QueryNode,
    RoutedHere,
    RoutedRemote,
)
from cortexd.settings import NeuronKind

_MESSAGES: Final = "/v1/messages"
# How often a node that takes its time is looked after.
_NODE_CHECK_S: Final = 5.0
# Statuses by which a node says that it is at fault, not the request and not its load.
_UNAVAILABLE: Final = 503
_LEAVING_CODES: Final = frozenset({"node_draining", "server_shutting_down"})
_NODE_FAULTS: Final = frozenset({500, 502})


class Dispatch:
    """One request's lease at the router and its connection to a node, until `release`."""

    def __init__(
        self,
        request: web.Request,
        record: RequestRecord,
        body: bytes,
        model: str,
        *,
        is_stream: bool,
    ) -> None:
        self._request = request
        self._services = request.app[SERVICES]
        self._record = record
        self._body = body
        self._model = model
        self._is_stream = is_stream
        self._prefix = prefix_chain(body)
        self._since = time.monotonic()
        self._routed: RoutedRemote | None = None
        self._is_answered = False
        self._upstream: aiohttp.ClientResponse | None = None
        self.lease_id = self._services.new_lease_id()
        gateway = self._services.settings.gateway
        patience_s = gateway.request_timeout_s if is_stream else gateway.unary_load_wait_s
        self._patience_until = asyncio.get_running_loop().time() + patience_s

    @property
    def node(self) -> str:
        """Return the name of the node that was chosen last."""
        return self._routed.node if self._routed is not None else "?"

    @property
    def kind(self) -> NeuronKind:
        """Return what answers at that node."""
        return self._routed.kind if self._routed is not None else "cortex"

    def release(self) -> None:
        """Close the node's socket at once and end the lease; nothing here waits."""
        if self._upstream is not None:
            self._upstream.close()
        self._services.tell_quietly("router", EndRequest(self.lease_id, self._is_answered))

    def failed(self, reason: str, *, is_refusing: bool = False) -> None:
        """Tell the router that the node failed at this request."""
        self._is_answered = False
        failure = NodeFailed(self.node, reason, self.lease_id, is_refusing)
        self._services.tell_quietly("router", failure)

    async def open(self) -> aiohttp.ClientResponse | None:
        """Return the head of a node's answer, None when this host is to serve the request.

        Raises: what the router refuses with, UpstreamUnavailable, InvalidRequest.
        """
        routed = await self._place([])
        if isinstance(routed, RoutedHere):
            return None
        try:
            return await self._post(routed)
        except UpstreamUnavailable as error:
            retry = await self._place_again(routed, error)
        self._record.num_resubmits += 1
        return await self._post(retry)

    async def _place(self, exclude: list[str]) -> RoutedHere | RoutedRemote:
        wanted = Place(
            self._model,
            self.lease_id,
            exclude=exclude,
            prefix=self._prefix,
            since=self._since,
        )
        wait_s = max(self._patience_until - asyncio.get_running_loop().time(), 0.0)
        routed = await place(self._services.bus, wanted, wait_s=wait_s)
        if isinstance(routed, RoutedRemote):
            self._routed = routed
            record = self._record
            record.model, record.node = routed.model_id, routed.node
            record.cold_start = record.cold_start or routed.cold_start
            record.is_stream = self._is_stream
        return routed

    async def _place_again(self, failed: RoutedRemote, error: UpstreamUnavailable) -> RoutedRemote:
        """Return another replica, or the same node when it had merely closed the connection."""
        self._services.tell_quietly("router", EndRequest(self.lease_id))
        self.lease_id = self._services.new_lease_id()
        try:
            routed = await self._place([failed.node])
        except CortexError as refusal:
            if isinstance(error, ConnectFailed):
                raise refusal if refusal.retriable else error from None
            routed = await self._place([])
        if isinstance(routed, RoutedHere):
            raise error
        return routed

    async def _post(self, routed: RoutedRemote) -> aiohttp.ClientResponse:
        path = self._request.path
        if routed.kind == "openai" and path.startswith(_MESSAGES):
            raise InvalidRequest(
                f'model "{routed.model_id}" runs on "{routed.node}", an external server that is '
                "only spoken to in the OpenAI dialect; use /v1/chat/completions",
                param="model",
            )
        is_alias = routed.model_id != self._model
        is_prompt = self._is_stream and routed.kind == "cortex"  # its 200 comes within its hold
        self._record.submitted = self._record.submitted or time.monotonic()
        post = self._services.upstream.post(
            routed.node,
            routed.base_url + path,
            request_headers(self._request.headers, self._request[REQUEST_ID]),
            with_model(self._body, routed.model_id) if is_alias else self._body,
            HEAD_TIMEOUT_S if is_prompt else self._services.settings.gateway.request_timeout_s,
        )
        try:
            self._upstream = await (post if is_prompt else self._watched(post, routed))
        except UpstreamUnavailable as error:
            self.failed(error.message, is_refusing=isinstance(error, ConnectFailed))
            raise
        if self._upstream.status == _UNAVAILABLE and await _takes_nothing_new(self._upstream):
            # It went on since the last poll; nothing of an answer was received.
            raise UpstreamUnavailable(
                f'node "{routed.node}" takes no new requests', retry_after_s=2
            )
        if self._upstream.status in _NODE_FAULTS:
            self.failed(f"HTTP {self._upstream.status}")
        else:
            self._is_answered = True
        return self._upstream

    async def _watched(
        self, post: Coroutine[Any, Any, aiohttp.ClientResponse], routed: RoutedRemote
    ) -> aiohttp.ClientResponse:
        """Return the head of an answer that may take long, as long as its node works on it.

        Raises: UpstreamUnavailable when the node is gone, or knows of no request.
        """
        posting = asyncio.ensure_future(post)
        started = time.monotonic()
        try:
            while True:
                await asyncio.wait({posting}, timeout=_NODE_CHECK_S)
                if posting.done():
                    return posting.result()
                await self._check_node(routed, time.monotonic() - started)
        finally:
            posting.cancel()

    async def _check_node(self, routed: RoutedRemote, waited_s: float) -> None:
        query = QueryNode(routed.node, routed.model_id)
        try:
            view = await self._services.bus.ask("router", query, deadline_s=_NODE_CHECK_S)
        except CortexError:
            return  # a router that restarts says nothing of the node
        assert isinstance(view, NodeView), "the router answers QueryNode with NodeView"
        if not view.is_healthy:
            what = "does not answer its polls any more"
        elif view.in_flight == 0 and waited_s > HEAD_TIMEOUT_S:
            what = f"accepted the request {waited_s:.0f} s ago and does not work on it"
        else:
            return
        raise UpstreamUnavailable(f'node "{routed.node}" {what}', retry_after_s=2)


async def _takes_nothing_new(upstream: aiohttp.ClientResponse) -> bool:
    """Tell whether a node refused because it is on its way out; the body can be read again."""
    try:
        async with asyncio.timeout(_NODE_CHECK_S):
            document = msgspec.json.decode(await upstream.read(), type=dict[str, object])
    except (TimeoutError, aiohttp.ClientError, OSError, msgspec.DecodeError, UnicodeDecodeError):
        return False
    error = document.get("error")
    return isinstance(error, dict) and error.get("code") in _LEAVING_CODES
