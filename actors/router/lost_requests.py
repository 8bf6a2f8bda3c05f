"""Records the requests of a front that was killed: the log line and the metrics, in its place.

Part of the router actor; no state. What the front knew of them stands in its file of open requests
(`actors.open_requests`), which waits for the next router when none was there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.open_requests import take_left
from cortexd.log import event
from cortexd.metrics import REQUEST_ERRORS, REQUESTS

if TYPE_CHECKING:
    from actors.router.router import Router


def record_lost_requests(router: Router, front: str, *, before: int) -> None:
    """Record what incarnations of a front earlier than `before` have left open."""
    for request in take_left(router.context.runtime_dir, front, before=before):
        labels = {"model": request.model, "node": request.node}
        event(
            router.log,
            "request.finished",
            30,
            id=request.request_id,
            route=request.route,
            model=request.model,
            node=request.node,
            front=front,
            status=0,
            error="front_crashed",
        )
        router.measure(REQUESTS.sample(1, **labels))
        router.measure(REQUEST_ERRORS.sample(1, **labels, code="front_crashed"))
