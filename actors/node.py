"""One host's daemon: binds the listeners, names the actors, and hands both to the root supervisor.

Called by `cortexd start` in the process that becomes the root. Nothing is started when an address
or the configuration is bad.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from typing import Final

import msgspec

from actors.root.runtime_dir import RuntimeDir
from actors.root.server_launch import launch_early
from actors.root.spec import GROUP_STOP_ORDER, ChildSpec
from actors.router.args import RouterArgs
from cortexd.address import parse_host_port
from cortexd.catalogue import Catalogue
from cortexd.demo import served_catalogue
from cortexd.desired import forget_desired
from cortexd.errors import ConfigError
from cortexd.keys import check_secrets
from cortexd.models import LoadOptions
from cortexd.paths import check_room_for_sockets, runtime_dir
from cortexd.settings import Settings

# Fronts drain first, while engines (GROUP_STOP_ORDER) and router still serve their streams.
_FRONT_STOP_ORDER = GROUP_STOP_ORDER + 50
# Connections wait here while a front restarts, so none is refused.
_BACKLOG = 512
_BIND_HINTS: Final = {
    errno.EADDRINUSE: "stop what uses the port (cortexd status tells if it is cortexd) or ",
    errno.EADDRNOTAVAIL: "no interface of this machine has the address; ",
    errno.EACCES: "this user may not use ports below 1024; ",
}


def run(settings: Settings, *, on_ready: Callable[[dict[str, str]], None]) -> int:
    """Run the daemon until it is stopped; return its exit code.

    `on_ready` is called once, with the bound addresses ("api", "metrics", "neuron" → "host:port"),
    when every light actor serves; models may still be loading. Raises: ConfigError.
    """
    catalogue = served_catalogue(settings)
    check_secrets(settings)
    # The lock first: a second daemon must learn who runs, not that a port is taken.
    check_room_for_sockets(runtime_dir(settings))
    locked = RuntimeDir(runtime_dir(settings))
    listeners: dict[str, socket.socket] = {}
    try:
        listeners = bind_listeners(settings)
        addresses = {name: _address(listener) for name, listener in listeners.items()}
        forget_desired(locked.path)
        specs = child_specs(settings, catalogue, listeners)
    except BaseException:
        for listener in listeners.values():
            listener.close()
        locked.close()
        raise
    early = launch_early(settings, (spec.target for spec in specs), locked.path)
    from actors.root.root import run_root  # takes a while, and the servers import meanwhile

    try:
        return run_root(
            settings,
            specs,
            listeners,
            addresses=addresses,
            on_ready=lambda: on_ready(addresses),
            locked=locked,
            early=early,
        )
    finally:
        for listener in listeners.values():
            listener.close()


def child_specs(
    settings: Settings, catalogue: Catalogue, listeners: dict[str, socket.socket]
) -> list[ChildSpec]:
    """Return the light actors in start order; equal `order` starts together."""
    default_models = [
        LoadOptions(
            model_id=entry.model_id,
            harness=entry.harness,
            quant=entry.quant,
            tensor_parallel=entry.tensor_parallel,
            devices=tuple(entry.devices) if entry.devices is not None else None,
        )
        for entry in settings.default_models
    ]
    router_args = msgspec.msgpack.encode(RouterArgs(default_models, catalogue))
    front_listeners = tuple(name for name in ("api", "neuron") if name in listeners)
    return [
        ChildSpec(name="router", target="actors.router.router:Router", args=router_args),
        ChildSpec(name="store", target="actors.store:Store"),
        ChildSpec(name="poller", target="actors.poller:Poller"),
        ChildSpec(name="evictor", target="actors.evictor:Evictor"),
        ChildSpec(name="reloader", target="actors.reloader:Reloader"),
        *_budgets(settings),
        ChildSpec(name="metrics", target="actors.metrics:Metrics", listeners=("metrics",)),
        *(
            ChildSpec(
                name=f"front.{index}",
                target="actors.front.front:Front",
                listeners=front_listeners,
                stop_order=_FRONT_STOP_ORDER,
                drain_s=settings.gateway.drain_s,
            )
            for index in range(settings.gateway.fronts)
        ),
    ]


def _budgets(settings: Settings) -> list[ChildSpec]:
    """Return the owner of the budgets, where there are keys that could have one."""
    if settings.entitlements.keys_file is None:
        return []
    return [ChildSpec(name="budgets", target="actors.budgets:Budgets")]


def bind_listeners(settings: Settings) -> dict[str, socket.socket]:
    """Bind every address the role serves. Raises: ConfigError naming the key and address."""
    wanted = {
        "api": ("gateway.listen", settings.gateway.listen),
        "metrics": ("gateway.metrics_listen", settings.gateway.metrics_listen),
        "neuron": ("neuron.listen", settings.neuron.listen),
    }
    if settings.role == "neuron":
        del wanted["api"]
    elif settings.role == "gateway":
        del wanted["neuron"]
    listeners: dict[str, socket.socket] = {}
    try:
        for name, (key, address) in wanted.items():
            listeners[name] = _bind(key, address)
    except ConfigError:
        for listener in listeners.values():
            listener.close()
        raise
    return listeners


def _bind(key: str, address: str) -> socket.socket:
    host, port = parse_host_port(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        code = error.errno or 0
        raise ConfigError(
            f"cannot listen on {address} ({key}): {os.strerror(code)}; "
            f"{_BIND_HINTS.get(code, '')}set {key}"
        ) from error
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
