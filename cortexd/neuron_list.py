"""Which configured neurons are remote, and what this host itself is called. Pure."""

from __future__ import annotations

from urllib.parse import urlsplit

from cortexd.address import parse_host_port
from cortexd.settings import NeuronEntry, Settings

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_WILDCARD = frozenset({"0.0.0.0", "::"})
_DEFAULT_PORTS = {"http": 80, "https": 443}


def remote_neurons(settings: Settings) -> list[NeuronEntry]:
    """Return the neurons that are polled: none of a neuron-only host, never this host's own."""
    if settings.role == "neuron":
        return []
    return [entry for entry in settings.neurons if not _is_this_host(entry, settings)]


def local_node_name(settings: Settings, hostname: str) -> str:
    """Return this host's name as a node: that of its own entry, else the host name.

    When a remote neuron bears the host name, "localhost" keeps the two apart.
    """
    for entry in settings.neurons:
        if _is_this_host(entry, settings):
            return entry.name
    taken = {entry.name for entry in remote_neurons(settings)}
    return hostname if hostname not in taken else "localhost"


def base_url(entry: NeuronEntry) -> str:
    """Return the endpoint without a trailing slash or `/v1`, which paths bring along."""
    return entry.endpoint.rstrip("/").removesuffix("/v1").rstrip("/")


def _is_this_host(entry: NeuronEntry, settings: Settings) -> bool:
    """Tell whether an endpoint is this daemon's own neuron listener."""
    if settings.role != "all" or entry.kind != "cortex":
        return False
    url = urlsplit(entry.endpoint)
    own = parse_host_port(settings.neuron.listen)
    if (url.port or _DEFAULT_PORTS.get(url.scheme)) != own.port:
        return False
    host = url.hostname or ""
    if own.host in _WILDCARD | _LOOPBACK:
        return host in _LOOPBACK | _WILDCARD
    return host == own.host
