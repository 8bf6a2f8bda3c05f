"""Finds the node of a request and posts it there: once more elsewhere if the first one fails."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Final

from aiohttp import web

from actors.front.auth import ANONYMOUS
from actors.front.body import aside, is_large
from actors.front.decode import decode_body
from actors.front.entitlement import hold
from actors.front.model_value import with_model
from actors.front.node_connection import NodeAnswer
from actors.front.node_watch import TOKENISES, await_head, check_serving, check_tokenises
from actors.front.record import RequestRecord
from actors.front.routing import place
from actors.front.services import REQUEST_ID, SERVICES
from actors.front.upstream import HEAD_TIMEOUT_S, ConnectFailed, request_headers
from cortexd.affinity import prefix_chain
from cortexd.anthropic import MessagesRequest
from cortexd.chat_body import chat_body
from cortexd.errors import CortexError, InvalidRequest, UpstreamError, UpstreamUnavailable
from cortexd.messages import HeldLease, NodeFailed, Place, RoutedHere, RoutedRemote
from cortexd.settings import NeuronKind

_MESSAGES: Final = "/v1/messages"
_CHAT: Final = "/v1/chat/completions"
_KEY_REFUSED: Final = frozenset({401, 403})
# Statuses by which a node says that it is at fault, not the request and not its load.
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
        self._services = request[SERVICES]
        self._record = record
        self._body = body
        self._model = model
        self._is_stream = is_stream
        self._prefix: list[int] = []
        self._since = time.monotonic()
        self._routed: RoutedRemote | None = None
        self._is_answered = False
        self._upstream: NodeAnswer | None = None
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
        self._close()
        self._services.leases.end(self.lease_id, is_answered=self._is_answered)

    def _close(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
            self._upstream = None

    def failed(self, reason: str, *, is_refusing: bool = False) -> None:
        """Tell the router that the node failed at this request."""
        self._is_answered = False
        self._services.leases.close_node(self.node)
        failure = NodeFailed(self.node, reason, self.lease_id, is_refusing)
        self._services.tell_quietly("router", failure)

    def begin(self) -> NodeAnswer | None:
        """Send the request if nobody must be waited for; `open`, which goes on with it, calls this.

        Return the answer to come, None when nothing was sent. Raises: InvalidRequest.
        """
        leases, upstream = self._services.leases, self._services.upstream
        # A large body may have to be changed, which takes time.
        routed = None if is_large(self._body) else leases.open_node(self._model)
        if routed is None:
            return None
        leases.begin(self._enter(routed))
        # One whose tokens are counted is held first.
        if self._record.estimate is None and upstream.has_idle(routed.base_url):
            path, body = self._addressed(routed, self._body)
            self._record.note_submitted()
            self._upstream = upstream.send_idle(routed.base_url, path, self._headers(routed), body)
        return self._upstream

    async def open(self) -> NodeAnswer | None:
        """Return the head of a node's answer, None when this host is to serve the request.

        Raises: what the router refuses with, UpstreamUnavailable, InvalidRequest.
        """
        if self._routed is None:
            self.begin()
        if self._routed is None and self._services.has_choice:  # with one node there is none
            self._prefix = await aside(self._body, prefix_chain)
        routed = self._routed or await self._place([])
        if isinstance(routed, RoutedHere):
            return None
        try:
            return await self._post(routed)
        except UpstreamUnavailable as error:
            self._close()
            retry = await self._place_again(routed, error)
        self._record.num_resubmits += 1
        return await self._post(retry)

    async def _place(self, exclude: list[str]) -> RoutedHere | RoutedRemote:
        answer = await self._ask(exclude)
        if isinstance(answer, RoutedRemote):
            self._record.cold_start = self._record.cold_start or answer.cold_start
            lease = self._enter(answer)
            self._services.leases.hold(lease)
            self._services.leases.note_open(self._model, lease, answer)
        return answer

    async def _ask(self, exclude: list[str]) -> RoutedHere | RoutedRemote:
        wanted = Place(
            self._model,
            self.lease_id,
            exclude=exclude,
            account=self._record.principal.account,
            prefix=self._prefix,
            since=self._since,
        )
        wait_s = max(self._patience_until - asyncio.get_running_loop().time(), 0.0)
        return await place(self._services.bus, wanted, wait_s=wait_s)

    def _enter(self, routed: RoutedRemote) -> HeldLease:
        """Note where the request goes; return the lease that it holds there."""
        self._routed = routed
        record = self._record
        record.place(self._services, routed.model_id, routed.node)
        record.is_stream = self._is_stream
        account = record.principal.account
        return HeldLease(self.lease_id, routed.model_id, routed.node, account, self._prefix)

    async def _place_again(self, failed: RoutedRemote, error: UpstreamUnavailable) -> RoutedRemote:
        """Return another replica, or the same node when it had merely closed the connection."""
        self._services.leases.end(self.lease_id)
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

    @property
    def is_translated(self) -> bool:
        """Tell whether the node answers in another dialect than the client's."""
        return self.kind == "openai" and self._request.path.startswith(_MESSAGES)

    def _addressed(self, routed: RoutedRemote, body: bytes) -> tuple[str, bytes]:
        """Return the path and the body the node gets: the client's own wherever it can be."""
        path = self._request.path
        if self.is_translated:
            if path != _MESSAGES:
                raise InvalidRequest(
                    f'model "{routed.model_id}" runs on "{routed.node}", an external server that '
                    f"has no {path}",
                    param="model",
                )
            return _CHAT, chat_body(decode_body(body, MessagesRequest), routed.model_id)
        is_alias = routed.model_id != self._model
        return path, with_model(body, routed.model_id) if is_alias else body

    async def _post(self, routed: RoutedRemote) -> NodeAnswer:
        try:
            if self._upstream is None:
                self._upstream = await self._send(routed)
            if not self._upstream.status:
                await self._await_head(self._upstream, routed)
        except UpstreamUnavailable as error:
            self._close()
            self.failed(error.message, is_refusing=isinstance(error, ConnectFailed))
            raise
        await check_serving(self._upstream, routed)
        if self._upstream.status in _NODE_FAULTS:
            self.failed(f"HTTP {self._upstream.status}")
        else:
            self._is_answered = True
        if self._upstream.status in _KEY_REFUSED and self._own_key(routed.node) is not None:
            raise UpstreamError(
                f'node "{routed.node}" refuses this gateway\'s key (HTTP {self._upstream.status}); '
                "its operator can mend key_file in [[neurons]]"
            )
        path = self._request.path
        if self.kind == "openai" and path in TOKENISES:
            await check_tokenises(self._upstream, routed, path)
        return self._upstream

    async def _await_head(self, upstream: NodeAnswer, routed: RoutedRemote) -> None:
        is_prompt = self._is_stream and routed.kind == "cortex"  # its 200 comes within its hold
        await await_head(
            self._services.bus,
            upstream,
            routed,
            HEAD_TIMEOUT_S if is_prompt else self._services.settings.gateway.request_timeout_s,
            is_watched=not is_prompt,
        )

    async def _send(self, routed: RoutedRemote) -> NodeAnswer:
        path, body = await aside(self._body, partial(self._addressed, routed))
        if self._record.estimate is not None:
            await hold(self._services, self._record, self._record.estimate.total)
        self._record.note_submitted()
        return await self._services.upstream.send(
            routed.node, routed.base_url, path, self._headers(routed), body
        )

    def _headers(self, routed: RoutedRemote) -> list[tuple[str, str]]:
        """Return what the node is sent; whose request it is is told to our own neurons only."""
        is_ours = routed.kind == "cortex" and routed.node in self._services.node_keys
        return request_headers(
            self._request.headers,
            self._request[REQUEST_ID],
            self._record.principal if is_ours else ANONYMOUS,
            self._own_key(routed.node),
        )

    def _own_key(self, node: str) -> str | None:
        """Return the key for a node; keys of this gateway's clients never leave it."""
        key = self._services.node_keys.get(node)
        return "" if key is None and self._services.keys.is_used else key
