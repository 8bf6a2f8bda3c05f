"""Waits for the head of a node's answer, and notices a node that will never send one.

Used by `actors.front.dispatch` for answers that may take long: a node that the polls say is gone,
or that knows of no request, is given up before a byte of an answer was received.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final, TypeVar

import msgspec

from actors.front.bus import Bus
from actors.front.error_response import CODE_HEADER
from actors.front.node_connection import AnswerBroken, NodeAnswer
from actors.front.upstream import HEAD_TIMEOUT_S
from cortexd.errors import (
    CortexError,
    InvalidRequest,
    ModelMismatch,
    ModelNotFound,
    UpstreamUnavailable,
)
from cortexd.messages import NodeView, QueryNode, RoutedRemote

# How often a node that takes its time is looked after.
CHECK_PERIOD_S: Final = 5.0
_NOT_SERVING: Final = frozenset({404, 503, 529})
_NO_SUCH_PATH: Final = frozenset({404, 405, 501})
# The field by which vLLM's answer is known: llama-server has the same paths with other fields, and
# answers a text that it does not see with an empty list.
TOKENISES: Final = {"/tokenize": "count", "/detokenize": "prompt"}
_LEAVING_CODES: Final = frozenset({"node_draining", "server_shutting_down"})

_Result = TypeVar("_Result")


async def await_head(
    bus: Bus, answer: NodeAnswer, routed: RoutedRemote, timeout_s: float, *, is_watched: bool
) -> None:
    """Return when the head of an answer is there.

    `is_watched`: it may take long, so see now and then that the node works on it. Raises:
    UpstreamUnavailable when the node is gone, knows of no request, or is silent for too long.
    """
    started = time.monotonic()
    while True:
        waited_s = time.monotonic() - started
        left_s = max(timeout_s - waited_s, 0.0)
        try:
            if await answer.has_head(min(left_s, CHECK_PERIOD_S) if is_watched else left_s):
                return
        except AnswerBroken as error:
            raise UpstreamUnavailable(
                f'node "{routed.node}" ended before it answered: {error}', retry_after_s=2
            ) from None
        waited_s = time.monotonic() - started
        if waited_s >= timeout_s:
            raise UpstreamUnavailable(
                f'node "{routed.node}" accepted the request and did not answer it within '
                f"{timeout_s:g} s",
                retry_after_s=2,
            )
        if is_watched:
            await _check(bus, routed, waited_s)


async def is_accepted(upstream: NodeAnswer, until: float) -> bool:
    """Tell whether a node begins to answer in time, and as it should."""
    try:
        is_there = await upstream.has_head(until - asyncio.get_running_loop().time())
    except AnswerBroken:
        return False  # the dispatch meets it too, and goes elsewhere
    return is_there and upstream.status == 200


async def is_done_by(task: asyncio.Task[_Result], until: float) -> bool:
    """Wait for a task, but not for longer, and without ending it; a lighter `asyncio.wait`."""
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] = loop.create_future()

    def wake(_: object = None) -> None:
        if not waiter.done():
            waiter.set_result(None)

    timer = loop.call_at(until, wake)
    task.add_done_callback(wake)
    try:
        await waiter
    finally:
        timer.cancel()
        task.remove_done_callback(wake)
    return task.done()


async def check_serving(upstream: NodeAnswer, routed: RoutedRemote) -> None:
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


async def check_tokenises(upstream: NodeAnswer, routed: RoutedRemote, path: str) -> None:
    """Raise when an external server has no /tokenize or /detokenize, or one of its own kind.

    `path` is one of `TOKENISES`. Raises: InvalidRequest. Else the body can still be read.
    """
    try:
        document = msgspec.json.decode(await upstream.read(), type=dict[str, object])
    except AnswerBroken:
        return  # whoever reads it next is told
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        document = {}
    is_known = upstream.status not in _NO_SUCH_PATH
    if is_known and (upstream.status != 200 or TOKENISES[path] in document):
        return
    told = f"HTTP {upstream.status}" + (f' without "{TOKENISES[path]}"' if is_known else "")
    raise InvalidRequest(
        f'model "{routed.model_id}" runs on "{routed.node}", an external server that has no {path} '
        f"as vLLM has it (it answered {told}); ask another node, or use its own API",
        param="model",
    )


async def _told_code(upstream: NodeAnswer) -> object:
    try:
        async with asyncio.timeout(CHECK_PERIOD_S):
            document = msgspec.json.decode(await upstream.read(), type=dict[str, object])
    except (TimeoutError, AnswerBroken, msgspec.DecodeError, UnicodeDecodeError):
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
