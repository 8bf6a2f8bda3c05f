"""Waits for the head of a node's answer, and notices a node that will never send one.

Used by `actors.front.dispatch` for answers that may take long: a node that the polls say is gone,
or that knows of no request, is given up before a byte of an answer was received.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, Final

import aiohttp
import msgspec

from actors.front.bus import Bus
from actors.front.error_response import CODE_HEADER
from actors.front.upstream import HEAD_TIMEOUT_S
from cortexd.errors import CortexError, ModelMismatch, ModelNotFound, UpstreamUnavailable
from cortexd.messages import NodeView, QueryNode, RoutedRemote

# How often a node that takes its time is looked after.
CHECK_PERIOD_S: Final = 5.0
_NOT_SERVING: Final = frozenset({404, 503, 529})
_LEAVING_CODES: Final = frozenset({"node_draining", "server_shutting_down"})


async def watched(
    bus: Bus, post: Coroutine[Any, Any, aiohttp.ClientResponse], routed: RoutedRemote
) -> aiohttp.ClientResponse:
    """Return the head of an answer, however long it takes, as long as its node works on it.

    Raises: UpstreamUnavailable when the node is gone, or knows of no request.
    """
    posting = asyncio.ensure_future(post)
    started = time.monotonic()
    try:
        while True:
            await asyncio.wait({posting}, timeout=CHECK_PERIOD_S)
            if posting.done():
                return posting.result()
            await _check(bus, routed, time.monotonic() - started)
    finally:
        posting.cancel()


async def check_serving(upstream: aiohttp.ClientResponse, routed: RoutedRemote) -> None:
    """Raise when a neuron does not take the request at all; else the body can still be read.

    Nothing of an answer was received then. Raises: UpstreamUnavailable (it is on its way out, since
    the last poll), ModelMismatch (it does not have the model that the poll saw).
    """
    if routed.kind != "cortex" or upstream.status not in _NOT_SERVING:
        return
    code = upstream.headers.get(CODE_HEADER) or await _told_code(upstream)
    if code in _LEAVING_CODES:
        raise UpstreamUnavailable(f'node "{routed.node}" takes no new requests')
    if code == ModelNotFound.code:
        raise ModelMismatch(
            f'node "{routed.node}" does not have model "{routed.model_id}", which was seen there; '
            "try again",
            retry_after_s=2,
        )


async def _told_code(upstream: aiohttp.ClientResponse) -> object:
    try:
        async with asyncio.timeout(CHECK_PERIOD_S):
            document = msgspec.json.decode(await upstream.read(), type=dict[str, object])
    except (TimeoutError, aiohttp.ClientError, OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    error = document.get("error")
    return error.get("code") if isinstance(error, dict) else None


async def _check(bus: Bus, routed: RoutedRemote, waited_s: float) -> None:
    query = QueryNode(routed.node, routed.model_id)
    try:
        view = await bus.ask("router", query, deadline_s=CHECK_PERIOD_S)
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
