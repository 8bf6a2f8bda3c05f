"""What the metrics actor counts, shows and forgets."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from actors.metric_registry import MetricRegistry
from actors.node_gauges import NodeGauges
from actors.request_counts import RequestCounts
from cortexd import metrics
from cortexd.messages import NeuronReport, RequestFinished
from cortexd.messages.neurons import NodeDevice, NodeModel


def exported(registry: MetricRegistry) -> dict[str, dict[tuple[str, ...], float]]:
    """Return value by sorted label values, by exported name."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(registry.render().decode()):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def finished(**fields: object) -> RequestFinished:
    """Return a request's record."""
    values: dict[str, object] = {
        "request_id": "r", "model": "m", "node": "n", "route": "/x", "status": 200,
        "error_code": None, "finish_reason": "stop", "stream": False, "cold_start": False,
        "duration_s": 2.0, "ttft_s": 0.5, "decode_s": 1.0, "prompt_tokens": 10,
        "cached_tokens": 4, "completion_tokens": 20,
    }  # fmt: skip
    return RequestFinished(**(values | fields))  # type: ignore[arg-type]


def neuron(name: str, *, is_healthy: bool) -> NeuronReport:
    """Return what a poll of a neuron found."""
    return NeuronReport(
        name=name,
        kind="cortex",
        base_url="http://far",
        is_healthy=is_healthy,
        sequence=1,
        num_successes=1,
        devices=[NodeDevice(0, total_mib=100, free_mib=60)],
        models=[NodeModel("m", "loaded", in_flight=3)],
    )


def test_every_family_is_exported_under_its_own_name() -> None:
    """What `cortexd.metrics` names is what a scrape holds, histograms with their buckets."""
    registry = MetricRegistry()
    for family in metrics.FAMILIES:
        sample = family.sample(1, **dict.fromkeys(family.labels, "x"))
        if family.kind == "gauge":
            registry.show("owner", [sample])
        else:
            registry.add([sample])
        name = family.name + ("_bucket" if family.kind == "histogram" else "")
        assert name in exported(registry), family.name
    buckets = exported(registry)["cortex_request_duration_seconds_bucket"]
    assert len(buckets) == len(metrics.DURATION.buckets) + 1


def test_request_is_counted_with_all_it_did() -> None:
    """One record moves every family that concerns it."""
    registry = MetricRegistry()
    RequestCounts(registry).add(finished(wait_s=0.2, num_retries=1, num_comments=3))
    RequestCounts(registry).add(finished(error_code="queue_full", completion_tokens=0))
    found = exported(registry)
    assert found["cortex_requests_total"] == {("m", "n"): 2}
    assert found["cortex_request_errors_total"] == {("queue_full", "m", "n"): 1}
    assert found["cortex_model_rejections_total"] == {("m", "n", "queue_full"): 1}
    assert found["cortex_retries_total"] == {("m", "n"): 1}
    assert found["cortex_keepalives_total"] == {("comment", "m", "n"): 3, ("event", "m", "n"): 0}
    assert found["cortex_queue_wait_seconds_sum"] == {("m", "n"): 0.2}
    assert found["cortex_tokens_per_second_sum"] == {("m", "n"): 20}
    assert found["cortex_cached_prompt_tokens_total"] == {("m", "n"): 8}


def test_wait_for_a_load_is_no_queue_wait() -> None:
    """Cold starts have their own counter; they would drown the queue's figures."""
    registry = MetricRegistry()
    RequestCounts(registry).add(finished(wait_s=60.0, cold_start=True))
    found = exported(registry)
    assert "cortex_queue_wait_seconds_sum" not in found
    assert found["cortex_cold_starts_total"] == {("m", "n"): 1}


def test_gauge_that_is_not_told_again_disappears() -> None:
    """An actor's gauges are whole each time, and go with it; another's stay."""
    registry = MetricRegistry()
    registry.show("router", [metrics.BREAKER_STATE.sample(2, node=node) for node in "ab"])
    registry.show("other", [metrics.QUEUE_DEPTH.sample(1, model="m")])
    registry.show("router", [metrics.BREAKER_STATE.sample(0, node="a")])
    assert exported(registry)["cortex_node_breaker_state"] == {("a",): 0}
    registry.forget("router")
    registry.forget("never heard of")
    found = exported(registry)
    assert "cortex_node_breaker_state" not in found
    assert found["cortex_router_queue_depth"] == {("m",): 1}


def test_histogram_counts_a_value_in_all_buckets_that_hold_it() -> None:
    """Buckets are cumulative, a bound belongs to its own bucket, and what is above all counts."""
    registry = MetricRegistry()
    for value in (0.1, 0.3, 1e6):
        registry.add([metrics.DURATION.sample(value, model="m", node="n")])
    found = exported(registry)
    buckets = {le: count for (le, *_), count in found[f"{metrics.DURATION.name}_bucket"].items()}
    assert [buckets[le] for le in ("0.1", "0.25", "0.5", "1200.0", "+Inf")] == [1, 1, 2, 2, 3]
    assert found[f"{metrics.DURATION.name}_count"] == {("m", "n"): 3}
    assert found[f"{metrics.DURATION.name}_sum"] == {("m", "n"): 1e6 + 0.4}


def test_label_value_stays_inside_its_quotes() -> None:
    """A name with quotes, backslashes and line ends comes back as it was."""
    name = 'a"b\\c\nd\\n'
    registry = MetricRegistry()
    registry.add([metrics.REQUESTS.sample(1, model=name, node="n")])
    assert exported(registry)["cortex_requests_total"] == {(name, "n"): 1}


def test_node_that_does_not_answer_shows_only_that() -> None:
    """Its models' and devices' series disappear, those of other nodes stay."""
    registry = MetricRegistry()
    nodes = NodeGauges(registry)
    for name in ("a", "b"):
        nodes.show_neuron(neuron(name, is_healthy=True))
    nodes.show_neuron(neuron("a", is_healthy=False))
    found = exported(registry)
    assert found["cortex_node_healthy"] == {("a",): 0, ("b",): 1}
    assert found["cortex_model_in_flight"] == {("m", "b"): 3}
    assert found["cortex_device_vram_used_mb"] == {("0", "b"): 40}
