"""Every metric of the daemon: name, kind, labels, meaning. Pure; the metrics actor renders them.

To add one: add a line here, then tell the "metrics" actor what happened, wherever it happens:

    self.tell("metrics", Measured([EVICTIONS.sample(1, model=..., node=..., reason="idle")]))

adds to a counter or is observed by a histogram. Gauges are told whole by their one owner,

    self.tell("metrics", Gauges([BREAKER_STATE.sample(2, node=...), ...]))

at each change and at least every few seconds (a restarted metrics actor knows nothing): a series
that is not told again disappears, and all of an actor's gauges disappear with the actor. What a
request adds travels in its one `RequestFinished`; devices and engines in the poller's reports.
Labels are bounded: names that clients invent are never labels. Names are the reference's where it
has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from cortexd.messages.metrics import Sample

Kind = Literal["counter", "gauge", "histogram"]

# Names a client invents would each become a time series.
UNKNOWN_MODEL: Final = "unknown"

_BY_MODEL: Final = ("model", "node")
_BY_KEY: Final = ("account", "key")
_REQUEST_S: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200)
_FIRST_TOKEN_S: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKENS_PER_S: Final = (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200, 400)
_WAIT_S: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300)
_LOAD_S: Final = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_LAG_S: Final = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1)
_CANCEL_S: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


@dataclass(frozen=True, slots=True)
class Family:
    """One metric with all its series. `name` is the exported one: counters end in "_total"."""

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...] = ()

    def sample(self, value: float, **labels: str) -> Sample:
        """Return what one event (or, of a gauge, one series' value) adds to it."""
        assert labels.keys() == set(self.labels), f"{self.name} has the labels {self.labels}"
        return Sample(self.name, value, [labels[name] for name in self.labels])


def _counter(name: str, text: str, labels: tuple[str, ...]) -> Family:
    return Family(name, "counter", text, labels)


def _gauge(name: str, text: str, labels: tuple[str, ...]) -> Family:
    return Family(name, "gauge", text, labels)


def _histogram(
    name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = _BY_MODEL
) -> Family:
    return Family(name, "histogram", text, labels, buckets)


# Of requests; all of these come from `RequestFinished`.
REQUESTS: Final = _counter("cortex_requests_total", "Requests ended", _BY_MODEL)
REQUEST_ERRORS: Final = _counter(
    "cortex_request_errors_total", "Requests that ended in an error", (*_BY_MODEL, "code")
)
COLD_STARTS: Final = _counter(
    "cortex_cold_starts_total", "Requests that waited for a model to load", _BY_MODEL
)
DURATION: Final = _histogram("cortex_request_duration_seconds", "Request duration", _REQUEST_S)
FIRST_TOKEN: Final = _histogram(
    "cortex_time_to_first_token_seconds", "Time to the first token", _FIRST_TOKEN_S
)
SPEED: Final = _histogram("cortex_tokens_per_second", "Decode speed of one request", _TOKENS_PER_S)
PROMPT_TOKENS: Final = _counter("cortex_prompt_tokens_total", "Prompt tokens", _BY_MODEL)
CACHED_TOKENS: Final = _counter(
    "cortex_cached_prompt_tokens_total", "Prompt tokens served from the prefix cache", _BY_MODEL
)
COMPLETION_TOKENS: Final = _counter("cortex_completion_tokens_total", "Generated tokens", _BY_MODEL)
QUEUE_WAIT: Final = _histogram(
    "cortex_queue_wait_seconds",
    "From a request's arrival to its hand-over to the engine or node, without cold loads",
    _WAIT_S,
)
RETRIES: Final = _counter(
    "cortex_retries_total", "Requests started over at another engine or node", _BY_MODEL
)
KEEPALIVES: Final = _counter(
    "cortex_keepalives_total", "Keep-alives sent on silent streams", (*_BY_MODEL, "kind")
)
REJECTIONS: Final = _counter(
    "cortex_model_rejections_total", "Requests refused by admission", ("node", "model", "reason")
)
# What an admission refuses with, by error code. A code that is not here is no rejection.
REJECTION_REASONS: Final = {"queue_full": "queue_full", "queue_timeout": "wait_timeout"}
CANCEL_LATENCY: Final = _histogram(
    "cortex_cancel_seconds",
    "From a request's cancellation to the engine's word that its sequence is freed",
    _CANCEL_S,
)
LOOP_LAG: Final = _histogram(
    "cortexd_front_loop_lag_seconds",
    "How late the timers of a front's event loop are while requests run",
    _LAG_S,
    (),
)

# Of models; told by the router.
LOAD_SECONDS: Final = _histogram(
    "cortex_model_load_seconds",
    "Seconds of each stage of a load: resolve (files), room (unloading others), start (engine); "
    "wake (of a model that slept)",
    _LOAD_S,
    (*_BY_MODEL, "stage"),
)
LOADS: Final = _counter(
    "cortex_model_loads_total",
    "Loads that ended, by result: loaded, woken or failed",
    (*_BY_MODEL, "result"),
)
EVICTIONS: Final = _counter(
    "cortex_evictions_total",
    "Models put to sleep (reason sleep) or unloaded: lru, priority, idle, asleep for too long, "
    "host_memory is short, defrag, operator",
    (*_BY_MODEL, "reason"),
)
QUEUE_DEPTH: Final = _gauge(
    "cortex_router_queue_depth", "Requests that wait in the router for a place", ("model",)
)
ANONYMOUS: Final = _gauge(
    "cortex_model_anon_in_flight", "Requests without an account that run", ("node", "model")
)
BREAKER_STATE: Final = _gauge(
    "cortex_node_breaker_state", "Circuit breaker: 0 closed, 1 half-open, 2 open", ("node",)
)

# Of keys; told by the owner of the budgets.
SPEND: Final = _counter("cortex_spend_tokens_total", "Tokens charged to a key", _BY_KEY)
SPEND_PROMPT: Final = _counter(
    "cortex_spend_prompt_tokens_total", "Prompt tokens charged to a key", _BY_KEY
)
SPEND_COMPLETION: Final = _counter(
    "cortex_spend_completion_tokens_total", "Generated tokens charged to a key", _BY_KEY
)
BUDGET_LIMIT: Final = _gauge("cortex_budget_limit_tokens", "A key's hard cap", _BY_KEY)
BUDGET_SPENT: Final = _gauge(
    "cortex_budget_spent_tokens", "Tokens charged in a key's current window", _BY_KEY
)
BUDGET_RESERVED: Final = _gauge(
    "cortex_budget_reserved_tokens", "Tokens that a key's running requests may still use", _BY_KEY
)
BUDGET_REFUSALS: Final = _counter(
    "cortex_budget_refusals_total", "Requests refused for their key's budget", (*_BY_KEY, "code")
)

# Of nodes; the metrics actor shows them from the poller's reports.
NODE_HEALTHY: Final = _gauge("cortex_node_healthy", "1 while the node answers its polls", ("node",))
_NODE_GAUGES: Final = tuple(
    _gauge(name, text, ("node", of))
    for name, of, text in (
        ("cortex_model_in_flight", "model", "Sequences that run"),
        ("cortex_model_queue_depth", "model", "Sequences that wait"),
        ("cortex_model_max_in_flight", "model", "Most sequences that run at the same time"),
        ("cortex_model_max_queue_depth", "model", "Most sequences that wait"),
        ("cortex_model_tok_s_prefill", "model", "Prefill speed, tokens/s"),
        ("cortex_model_tok_s_decode", "model", "Decode speed, tokens/s"),
        ("cortex_model_kv_blocks_used", "model", "KV blocks in use"),
        ("cortex_model_kv_blocks_cached", "model", "Free KV blocks with known KV"),
        ("cortex_model_kv_blocks", "model", "KV blocks in all"),
        ("cortex_model_preemptions", "model", "Preemptions since load"),
        ("cortex_device_vram_used_mb", "device", "Device memory in use, MiB"),
        ("cortex_device_vram_free_mb", "device", "Device memory free, MiB"),
        ("cortex_device_utilization_pct", "device", "Device utilisation, percent"),
        ("cortex_device_temp_c", "device", "Device temperature, Celsius"),
    )
)

# Of processes; counted by the metrics actor itself.
ACTOR_DOWNS: Final = _counter("cortexd_actor_downs_total", "Actor processes that ended", ("actor",))

FAMILIES: Final = (
    *(family for family in list(globals().values()) if isinstance(family, Family)),
    *_NODE_GAUGES,
)
