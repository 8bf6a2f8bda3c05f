"""What must hold between the values of a configuration, beyond type and range. Pure.

Each rule yields a `Problem` naming the key to change and the keys it compared; `cortexd.config`
drops those about a key that already failed on its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Final

from cortexd.address import HostPort, check_endpoint, parse_host_port
from cortexd.errors import ConfigError
from cortexd.model_id import check_model_id
from cortexd.problem import Problem, dotted
from cortexd.settings import Settings
from cortexd.toml_lines import Path

_ORIGIN: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/\s\"]+")
_METRICS: Path = ("gateway", "metrics_listen")
_LISTENERS: tuple[Path, ...] = (
    ("gateway", "listen"),
    _METRICS,
    ("neuron", "listen"),
)


def check_rules(settings: Settings) -> Iterator[Problem]:
    """Yield every broken rule."""
    yield from _listeners(settings)
    yield from _origins(settings)
    yield from _neurons(settings)
    yield from _default_models(settings)
    yield from _engine(settings)
    yield from _supervision(settings)
    yield from _text(settings)
    yield from _order(settings, ("gateway", "keepalive_s"), ("gateway", "event_keepalive_s"))


def warnings(settings: Settings) -> Iterator[str]:
    """Yield what works and may surprise; one line each."""
    if settings.role == "gateway" and settings.default_models:
        yield 'default_models are not loaded: role "gateway" runs no engine'
    if settings.role == "neuron" and settings.neurons:
        yield 'neurons are not used: role "neuron" runs no gateway'
    asks_for_keys = settings.entitlements.keys_file is not None
    if asks_for_keys and settings.entitlements.require_auth:
        yield from _keyless_neurons(settings)
    for path in _active_listeners(settings):
        address = parse_host_port(str(_value(settings, path)))
        is_open = path == _METRICS or not (asks_for_keys and settings.entitlements.require_auth)
        if not address.is_loopback and is_open:
            yield (
                f"{dotted(path)} = {address} can be reached by other machines "
                "and no key is asked of them"
            )


def _keyless_neurons(settings: Settings) -> Iterator[str]:
    for neuron in settings.neurons:
        if neuron.kind == "cortex" and neuron.key_file is None and settings.role != "neuron":
            yield (
                f'neuron "{neuron.name}" has no key_file: it is not told whose requests it gets, '
                "so accounts share its prefix cache"
            )


def _active_listeners(settings: Settings) -> tuple[Path, ...]:
    if settings.role == "gateway":
        return _LISTENERS[:2]
    return _LISTENERS[1:] if settings.role == "neuron" else _LISTENERS


def _value(settings: Settings, path: Path) -> object:
    value: object = settings
    for part in path:
        value = getattr(value, str(part))
    return value


def _listeners(settings: Settings) -> Iterator[Problem]:
    addresses: dict[Path, HostPort] = {}
    for path in _LISTENERS:
        try:
            addresses[path] = parse_host_port(str(_value(settings, path)))
        except ConfigError as error:
            yield Problem(path, f"{dotted(path)}: {error}")
    for (first, one), (second, other) in combinations(addresses.items(), 2):
        same_host = one.host == other.host or one.is_wildcard or other.is_wildcard
        if one.port and one.port == other.port and same_host:
            message = f"{dotted(second)} = {other} uses the same port as {dotted(first)} = {one}"
            yield Problem(second, message, (first,))


def _neurons(settings: Settings) -> Iterator[Problem]:
    if settings.role == "gateway" and not settings.neurons:
        message = (
            'role "gateway" runs no models itself and no [[neurons]] are configured; add one '
            'table for each neuron (name, endpoint), or use role "all" or "neuron"'
        )
        yield Problem(("role",), message)
    for i, neuron in enumerate(settings.neurons):
        yield from _checked(("neurons", i, "endpoint"), check_endpoint, neuron.endpoint)
        if not neuron.name.strip():
            path: Path = ("neurons", i, "name")
            yield Problem(path, f"{dotted(path)} is empty; give the neuron a name")
    for key in ("name", "endpoint"):
        values = [str(getattr(neuron, key)).rstrip("/") for neuron in settings.neurons]
        yield from _duplicates("neurons", key, values)


def _default_models(settings: Settings) -> Iterator[Problem]:
    for i, model in enumerate(settings.default_models):
        yield from _checked(("default_models", i, "model_id"), check_model_id, model.model_id)
        if model.quant is not None and not model.quant.strip():
            path: Path = ("default_models", i, "quant")
            yield Problem(path, f"{dotted(path)} is empty; name a quantisation or leave it out")
        yield from _devices(i, model.devices, model.tensor_parallel)
    ids = [model.model_id for model in settings.default_models]
    yield from _duplicates("default_models", "model_id", ids)


def _devices(index: int, devices: list[int] | None, tensor_parallel: int) -> Iterator[Problem]:
    if devices is None:
        return
    path: Path = ("default_models", index, "devices")
    if len(devices) != tensor_parallel:
        message = (
            f"{dotted(path)} names {len(devices)} devices and tensor_parallel is "
            f"{tensor_parallel}; allowed: exactly one device for each rank"
        )
        yield Problem(path, message, (("default_models", index, "tensor_parallel"),))
    if len(set(devices)) != len(devices):
        yield Problem(path, f"{dotted(path)} names a device twice; each rank needs its own")


def _engine(settings: Settings) -> Iterator[Problem]:
    tokens: Path = ("engine", "max_num_batched_tokens")
    yield from _order(settings, ("engine", "max_prefill_chunk"), tokens)
    # Decode rows come first in each step; with more rows than tokens some would never run.
    yield from _order(settings, ("engine", "max_num_seqs"), tokens)
    engine = settings.engine
    if engine.activations == "rounded":
        for key, value in (("backend", engine.backend), ("device", engine.device)):
            if value not in {"auto", "cpu"}:
                path: Path = ("engine", "activations")
                message = (
                    f'{dotted(path)} = "rounded" is for the CPU\'s kernels, but engine.{key} = '
                    f'"{value}"; use "auto"'
                )
                yield Problem(path, message, (("engine", key),))


def _supervision(settings: Settings) -> Iterator[Problem]:
    bounds = settings.supervision
    heartbeat: Path = ("supervision", "heartbeat_ms")
    suspect: Path = ("supervision", "suspect_after_s")
    if bounds.heartbeat_ms / 1000 >= bounds.suspect_after_s:
        message = (
            f"{dotted(suspect)} = {bounds.suspect_after_s} must be above "
            f"{dotted(heartbeat)} = {bounds.heartbeat_ms} (milliseconds)"
        )
        yield Problem(suspect, message, (heartbeat,))
    yield from _order(settings, suspect, ("supervision", "kill_after_s"), strict=True)


def _origins(settings: Settings) -> Iterator[Problem]:
    for index, origin in enumerate(settings.gateway.allowed_origins or ()):
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            yield Problem(
                ("gateway", "allowed_origins", index),
                f'gateway.allowed_origins[{index}]: "{origin}" is not an origin; allowed: "*", or '
                'scheme and host without a path, such as "https://chat.example"',
            )


def _text(settings: Settings) -> Iterator[Problem]:
    optional: tuple[Path, ...] = (
        ("models_config",),
        ("entitlements", "keys_file"),
        ("store", "cache_dir"),
        ("store", "hub_cache_dir"),
        ("paths", "runtime_dir"),
        ("paths", "state_dir"),
    )
    for path in optional:
        value = _value(settings, path)
        if value is not None and (not str(value).strip() or "\0" in str(value)):
            yield Problem(path, f"{dotted(path)} is not a path; leave it out for its default")
    if settings.store.pip is not None and not settings.store.pip:
        message = 'store.pip is empty; give the command, such as ["pip"], or leave it out'
        yield Problem(("store", "pip"), message)


def _order(settings: Settings, low: Path, high: Path, *, strict: bool = False) -> Iterator[Problem]:
    """Check that the value at `low` is at most (`strict`: below) the one at `high`."""
    small, large = _value(settings, low), _value(settings, high)
    assert isinstance(small, int | float), f"{dotted(low)} is not a number"
    assert isinstance(large, int | float), f"{dotted(high)} is not a number"
    if small < large or (small == large and not strict):
        return
    relation = "below" if strict else "at most"
    message = f"{dotted(low)} = {small} must be {relation} {dotted(high)} = {large}"
    yield Problem(low, message, (high,))


def _checked(path: Path, check: Callable[[str], None], text: str) -> Iterator[Problem]:
    try:
        check(text)
    except ConfigError as error:
        yield Problem(path, f"{dotted(path)}: {error}")


def _duplicates(array: str, key: str, values: list[str]) -> Iterator[Problem]:
    first_of: dict[str, int] = {}
    for i, value in enumerate(values):
        first = first_of.setdefault(value, i)
        if first != i:
            path: Path = (array, i, key)
            message = f'{dotted(path)} = "{value}" is also that of {array}[{first}]'
            yield Problem(path, message, ((array, first, key),))
