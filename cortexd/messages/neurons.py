"""Remote neurons: what a poll saw, where a request goes, what is asked of a neuron."""

from __future__ import annotations

import msgspec

from cortexd.breaker import BreakerState
from cortexd.messages.control import Message
from cortexd.models import LoadOptions, ModelLimits, ModelPolicy, ModelState
from cortexd.openai import ModelCost
from cortexd.settings import NeuronKind


class NodeDevice(msgspec.Struct, frozen=True, array_like=True):
    """One device of a node; what the node does not tell is None."""

    index: int
    total_mib: int
    free_mib: int | None = None
    utilization_pct: float | None = None
    temperature_c: float | None = None


class NodeModel(msgspec.Struct, frozen=True, array_like=True):
    """One model as its node reported it."""

    model_id: str
    state: ModelState
    in_flight: int = 0
    queue_depth: int = 0
    limits: ModelLimits | None = None
    memory_mib: int | None = None
    capabilities: list[str] = []
    can_call_tools: bool = False
    can_reason: bool = False
    detail: str | None = None
    tok_s_prefill: float | None = None
    tok_s_decode: float | None = None
    # Bounds of the two counts above; None where the node does not tell.
    max_in_flight: int | None = None
    max_queue_depth: int | None = None
    progress: float | None = None  # 0..1 while it loads
    eta_s: float | None = None
    priority: int | None = None  # its residency class there


class NeuronReport(Message, frozen=True, tag="NeuronReport"):
    """Poller → router and metrics, after each poll of one remote neuron.

    `sequence` counts the polls of this poller; 0 of `num_successes` means that nothing is known of
    the node yet. A node that does not answer keeps its last devices and models.
    """

    name: str
    kind: NeuronKind
    base_url: str
    is_healthy: bool
    sequence: int
    num_successes: int
    devices: list[NodeDevice] = []
    models: list[NodeModel] = []
    error: str | None = None
    is_draining: bool = False  # it finishes what runs and takes nothing new


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The router's view of one remote neuron, for people and for `/v1/models`."""

    name: str
    kind: NeuronKind
    endpoint: str
    is_healthy: bool
    age_s: float | None  # since the last report; None: never
    dispatched: int  # requests this gateway has running there
    models: list[NodeModel] = []
    error: str | None = None
    is_draining: bool = False
    breaker: BreakerState = "closed"


class CatalogueCard(msgspec.Struct, frozen=True, kw_only=True):
    """A catalogue model as a gateway offers it: where it could run."""

    model_id: str
    feasible_on: list[str]
    capabilities: list[str] = []
    cost: ModelCost | None = None


class Place(Message, frozen=True, tag="Place"):
    """Front → router: which node serves this model? Answer `RoutedHere`, `RoutedRemote`, an error.

    `RoutedRemote` opens a lease that `EndRequest` (or the front's death) closes. With `wait`, the
    answer comes when a node has the model loaded and a free seat (within the deadline). Nodes in
    `exclude` have failed this request already. `account`: as of `Route`. `prefix` are the links of
    `cortexd.affinity`, `since` is when it first asked (monotonic seconds).
    """

    model: str
    request_id: str
    wait: bool = False
    exclude: list[str] = []
    account: str = ""
    prefix: list[int] = []
    since: float = 0.0


class RoutedHere(Message, frozen=True, tag="RoutedHere"):
    """This host serves it: `Route` gives the lease."""

    model_id: str


class RoutedRemote(Message, frozen=True, tag="RoutedRemote"):
    """A remote neuron serves it; `sequence` is the poll that the choice rests on.

    Until `open_until` (monotonic seconds, 0: not at all) the front that asked may send it more
    requests for the model without asking, and tells of them in a `LeaseReport`.
    """

    node: str
    kind: NeuronKind
    base_url: str
    model_id: str
    sequence: int
    cold_start: bool = False
    open_until: float = 0.0


class NodeFailed(Message, frozen=True, tag="NodeFailed"):
    """Front → router: a node did not answer a request, or failed at it.

    With `is_refusing` no connection came about: it is not used until it answers a poll.
    """

    node: str
    reason: str
    request_id: str = ""
    is_refusing: bool = True


class QueryNode(Message, frozen=True, tag="QueryNode"):
    """Front → router: how is the node that I wait for? Answer `NodeView`."""

    node: str
    model_id: str


class NodeView(Message, frozen=True, tag="NodeView"):
    """Answer to QueryNode, from the last poll; `in_flight` None: the node does not tell."""

    is_healthy: bool
    in_flight: int | None = None


class QueryLoading(Message, frozen=True, tag="QueryLoading"):
    """Front → router: how far is the load of this model, here or elsewhere? Answer `Loading`."""

    model: str


class Loading(Message, frozen=True, tag="Loading"):
    """Answer to QueryLoading; all None: nothing is known to load."""

    stage: str | None = None
    progress: float | None = None
    eta_s: float | None = None


class LoadOnNode(Message, frozen=True, tag="LoadOnNode"):
    """Router → poller: POST /models/load at a neuron; `Ok` when the model is loaded there."""

    node: str
    options: LoadOptions
    policy: ModelPolicy | None = None


class UnloadOnNode(Message, frozen=True, tag="UnloadOnNode"):
    """Router → poller: POST /models/unload at a neuron; `Ok` when its memory is free."""

    node: str
    model_id: str
    force: bool = False
