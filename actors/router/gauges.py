"""What the router shows of itself in the metrics: who waits, which nodes are left alone."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from actors.router.managed_model import anonymous_by_place
from cortexd.breaker import BreakerState
from cortexd.messages import Sample
from cortexd.metrics import ANONYMOUS, BREAKER_STATE, QUEUE_DEPTH

if TYPE_CHECKING:
    from actors.router.router import Router

_BREAKER_VALUES: Final[dict[BreakerState, int]] = {"closed": 0, "half_open": 1, "open": 2}


def router_gauges(router: Router) -> list[Sample]:
    """Return the gauges as they stand now."""
    depths = Counter(router.fleet.queue_depths()) + Counter(router.requests.queue_depths())
    samples = [QUEUE_DEPTH.sample(depth, model=model_id) for model_id, depth in depths.items()]
    samples += [
        BREAKER_STATE.sample(_BREAKER_VALUES[node.breaker], node=node.name)
        for node in router.fleet.statuses()
    ]
    here = (
        (router.node_name, lease)
        for model in router.models.values()
        for lease in model.leases.values()
    )
    elsewhere = ((node, lease) for node, _, lease in router.fleet.nodes.leases())
    samples += [
        ANONYMOUS.sample(count, node=node, model=model_id)
        for (node, model_id), count in anonymous_by_place([*here, *elsewhere]).items()
    ]
    return samples
