"""The gauges of every node's models and devices; a node's series disappear with it.

Owned by the metrics actor. Values come whole with each report, so all series are written anew.
"""

from __future__ import annotations

from collections.abc import Iterator

from actors.metric_registry import MetricRegistry
from cortexd.messages import HostReport, LoadReport, NeuronReport, Sample
from cortexd.messages.neurons import NodeDevice, NodeModel
from cortexd.metrics import NODE_HEALTHY
from cortexd.settings import Engine

_Series = tuple[str, str, float | None]  # gauge, model or device, value


class NodeGauges:
    """Show the last report of each node."""

    def __init__(self, registry: MetricRegistry) -> None:
        self._registry = registry

    def show_host(self, node: str, report: HostReport, engine: Engine) -> None:
        """Show this host; `engine` holds the bounds of its models."""
        series = [item for load in report.loads for item in _of_engine(load, engine)]
        for device in report.devices:
            used_mib = device.memory_used_bytes / 2**20
            free_mib = device.memory_total_bytes / 2**20 - used_mib
            series += _of_device(
                str(device.index),
                used_mib,
                free_mib,
                device.utilization_pct,
                device.temperature_c,
            )
        self._show(node, _samples(node, series))

    def show_neuron(self, report: NeuronReport) -> None:
        """Show a remote neuron; nothing of one that does not answer is shown but that."""
        series: list[_Series] = []
        if report.is_healthy:
            series += [item for model in report.models for item in _of_model(model)]
            series += [item for device in report.devices for item in _of_remote_device(device)]
        is_up = NODE_HEALTHY.sample(report.is_healthy, node=report.name)
        self._show(report.name, [is_up, *_samples(report.name, series)])

    def _show(self, node: str, samples: list[Sample]) -> None:
        self._registry.show(f"node {node}", samples)


def _samples(node: str, series: list[_Series]) -> list[Sample]:
    return [Sample(name, value, [node, of]) for name, of, value in series if value is not None]


def _of_engine(load: LoadReport, engine: Engine) -> Iterator[_Series]:
    """Say the same of a local model as of a remote one, and what only its engine knows."""
    yield from _of_model(
        NodeModel(
            load.model_id,
            "loaded",
            in_flight=load.num_running,
            queue_depth=load.num_waiting,
            max_in_flight=engine.max_num_seqs,
            max_queue_depth=engine.max_queue_depth,
            tok_s_prefill=load.tok_s_prefill,
            tok_s_decode=load.tok_s_decode,
        )
    )
    yield "cortex_model_kv_blocks_used", load.model_id, load.kv_blocks_used
    yield "cortex_model_kv_blocks_cached", load.model_id, load.kv_blocks_cached
    yield "cortex_model_kv_blocks", load.model_id, load.kv_blocks_total
    yield "cortex_model_preemptions", load.model_id, load.num_preemptions


def _of_model(model: NodeModel) -> Iterator[_Series]:
    if model.state == "loaded":
        yield "cortex_model_in_flight", model.model_id, model.in_flight
        yield "cortex_model_queue_depth", model.model_id, model.queue_depth
        yield "cortex_model_max_in_flight", model.model_id, model.max_in_flight
        yield "cortex_model_max_queue_depth", model.model_id, model.max_queue_depth
        yield "cortex_model_tok_s_prefill", model.model_id, model.tok_s_prefill
        yield "cortex_model_tok_s_decode", model.model_id, model.tok_s_decode


def _of_remote_device(device: NodeDevice) -> list[_Series]:
    free_mib = device.free_mib
    used_mib = None if free_mib is None else device.total_mib - free_mib
    label = str(device.index)
    return _of_device(label, used_mib, free_mib, device.utilization_pct, device.temperature_c)


def _of_device(
    label: str,
    used_mib: float | None,
    free_mib: float | None,
    utilization_pct: float | None,
    temperature_c: float | None,
) -> list[_Series]:
    return [
        ("cortex_device_vram_used_mb", label, used_mib),
        ("cortex_device_vram_free_mb", label, free_mib),
        ("cortex_device_utilization_pct", label, utilization_pct),
        ("cortex_device_temp_c", label, temperature_c),
    ]
