"""Listen addresses and endpoint URLs as configuration files write them. Pure."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple
from urllib.parse import urlsplit

from cortexd.errors import ConfigError

_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")
_PORT = re.compile(r"[0-9]{1,5}")
_ALLOWED = 'host:port, such as "127.0.0.1:31313" or "[::1]:31313", with a port from 0 to 65535'


class HostPort(NamedTuple):
    """Where to listen; `host` has no brackets, port 0 lets the system choose."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def is_wildcard(self) -> bool:
        """Whether it means every address of the machine."""
        return self.host in ("0.0.0.0", "::")

    def url(self) -> str:
        """Return the URL a client on this machine uses (a wildcard is reached over loopback)."""
        if not self.is_wildcard:
            return f"http://{self}"
        return f"http://{HostPort('::1' if ':' in self.host else '127.0.0.1', self.port)}"


def parse_host_port(text: str) -> HostPort:
    """Split `host:port`. Raises: ConfigError that says what is allowed."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        is_host = _is_ipv6(host)
    else:
        is_host = _HOST_NAME.fullmatch(host) is not None
    if not (colon and is_host and _PORT.fullmatch(port) and int(port) <= 65535):
        raise ConfigError(f'"{text}" is not an address; allowed: {_ALLOWED}')
    return HostPort(host, int(port))


def check_endpoint(text: str) -> None:
    """Check the URL of a neuron or engine. Raises: ConfigError that says what is allowed."""
    try:
        parts = urlsplit(text)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a bad port or bracket
        is_url = False
    if not is_url or re.search(r"[\s\x00-\x1f]", text) or parts.query or parts.fragment:
        raise ConfigError(
            f'"{text}" is not an endpoint; allowed: http://host[:port] or https://host[:port]'
        )


def _is_ipv6(text: str) -> bool:
    try:
        return isinstance(ipaddress.ip_address(text), ipaddress.IPv6Address)
    except ValueError:
        return False
