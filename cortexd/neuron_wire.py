"""Reads what neurons and other servers say of themselves, of any version. Pure.

Only what is used is read, and only its absence or a wrong type of the whole document is an error:
an entry that makes no sense is left out, an unknown field is ignored, a missing one has a default.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta

from cortexd.errors import ERRORS_BY_CODE, CortexError, UpstreamError
from cortexd.messages.neurons import NodeDevice, NodeModel
from cortexd.models import ModelLimits, ModelState

_STATES: Final[dict[str, ModelState]] = {
    "unloaded": "unloaded",
    "loading": "loading",
    "loaded": "loaded",
    "reloading": "loaded",
    "draining": "draining",
    "sleeping": "sleeping",
    "recovering": "recovering",
    "poisoned": "recovering",
    "failed": "failed",
}
_Entry = TypeVar("_Entry", bound=msgspec.Struct)
# JSON has integers of any size, our messages have not.
_Int = Annotated[int, Meta(ge=-(2**53), le=2**53)]


class BadAnswer(ValueError):
    """The document is not what this path should answer."""


class _Limit(msgspec.Struct):
    context: _Int | None = None
    output: _Int | None = None


class _Servable(msgspec.Struct):
    ok: bool = True
    detail: str | None = None


class _Model(msgspec.Struct):
    id: str
    status: str = "loaded"
    vram_used_mb: _Int | None = None
    capabilities: list[str] = []
    tool_call: bool = False
    reasoning: bool = False
    limit: _Limit | None = None
    servable: _Servable | None = None
    max_model_len: _Int | None = None
    stage: str | None = None
    progress: float | None = None
    eta_s: float | None = None
    residency_priority: _Int | None = None


class _ModelLoad(msgspec.Struct):
    id: str
    in_flight: _Int = 0
    queue_depth: _Int = 0
    tok_s_prefill: float | None = None
    tok_s_decode: float | None = None
    max_in_flight: _Int | None = None
    max_queue_depth: _Int | None = None


class _DeviceLoad(msgspec.Struct):
    index: _Int
    vram_free_mb: _Int | None = None
    utilization_pct: float | None = None
    temp_c: float | None = None


class _Device(msgspec.Struct):
    index: _Int
    vram_total_mb: _Int = 0


def read_models(body: bytes) -> list[NodeModel]:
    """Return the models of a neuron's `/models`. Raises: BadAnswer."""
    return [_node_model(entry) for entry in _entries(_json(body, list), _Model)]


def read_openai_models(body: bytes, *, is_ready: bool) -> list[NodeModel]:
    """Return the models of a `/v1/models`; all are loaded once the server is ready."""
    entries = _entries(_json(body, dict).get("data"), _Model)
    state: ModelState = "loaded" if is_ready else "loading"
    return [
        msgspec.structs.replace(_node_model(entry), state=state, detail=None) for entry in entries
    ]


def read_devices(body: bytes) -> list[NodeDevice]:
    """Return the devices of a neuron's `/discovery`. Raises: BadAnswer."""
    found = _entries(_json(body, dict).get("devices"), _Device)
    return [NodeDevice(device.index, device.vram_total_mb) for device in found]


def answered_error(node: str, status: int, body: bytes, code: str | None = None) -> CortexError:
    """Return the error a neuron answered: of its own class when the code is known here.

    `code`: as a header told it, for a body of the dialect that has no codes.
    """
    try:
        error = msgspec.json.decode(body, type=dict[str, dict[str, object]])["error"]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError):
        error = {}
    message = str(error.get("message") or f"HTTP {status}")
    error_class = ERRORS_BY_CODE.get(code or str(error.get("code")), UpstreamError)
    return error_class(f'node "{node}": {message}')


def with_load(
    body: bytes, devices: list[NodeDevice], models: list[NodeModel]
) -> tuple[list[NodeDevice], list[NodeModel]]:
    """Return devices and models with the figures of a neuron's `/health`. Raises: BadAnswer."""
    document = _json(body, dict)
    device_loads = {load.index: load for load in _entries(document.get("devices"), _DeviceLoad)}
    model_loads = {load.id: load for load in _entries(document.get("models"), _ModelLoad)}
    return (
        [_loaded_device(device, device_loads.get(device.index)) for device in devices],
        [_loaded_model(model, model_loads.get(model.model_id)) for model in models],
    )


def is_draining(body: bytes) -> bool:
    """Tell whether a neuron's `/health` says that it takes no new requests. Raises: BadAnswer."""
    return bool(_json(body, dict).get("status") == "draining")


def _loaded_device(device: NodeDevice, load: _DeviceLoad | None) -> NodeDevice:
    if load is None:
        return device
    return NodeDevice(
        device.index, device.total_mib, load.vram_free_mb, load.utilization_pct, load.temp_c
    )


def _loaded_model(model: NodeModel, load: _ModelLoad | None) -> NodeModel:
    if load is None:
        return model
    return msgspec.structs.replace(
        model,
        in_flight=max(load.in_flight, 0),
        queue_depth=max(load.queue_depth, 0),
        tok_s_prefill=load.tok_s_prefill,
        tok_s_decode=load.tok_s_decode,
        # Older nodes say 0 for "unknown".
        max_in_flight=load.max_in_flight or None,
        max_queue_depth=load.max_queue_depth or None,
    )


def _node_model(entry: _Model) -> NodeModel:
    is_servable = entry.servable is None or entry.servable.ok
    # A state of a later release is used as long as the node says that the model serves.
    state = _STATES.get(entry.status, "loaded" if is_servable else "recovering")
    if state == "loaded" and not is_servable:
        state = "recovering"
    return NodeModel(
        entry.id,
        state,
        limits=_limits(entry),
        memory_mib=entry.vram_used_mb,
        capabilities=entry.capabilities,
        can_call_tools=entry.tool_call,
        can_reason=entry.reasoning,
        detail=entry.stage or (None if entry.servable is None else entry.servable.detail),
        progress=entry.progress,
        eta_s=entry.eta_s,
        priority=entry.residency_priority,
    )


def _limits(entry: _Model) -> ModelLimits | None:
    context = entry.limit.context if entry.limit is not None else None
    context = context or entry.max_model_len
    if not context or context < 1:
        return None
    output = entry.limit.output if entry.limit is not None else None
    return ModelLimits(context=context, output=output or context)


def _json(body: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadAnswer(str(error)) from None


def _entries(values: object, kind: type[_Entry]) -> list[_Entry]:
    """Return the entries that make sense, each id or index once."""
    entries: dict[object, _Entry] = {}
    for value in values if isinstance(values, list) else []:
        try:
            entry = msgspec.convert(value, kind, strict=False)
        except msgspec.ValidationError:
            continue
        entries[getattr(entry, "id", None) or getattr(entry, "index", None)] = entry
    return list(entries.values())
