"""Listen addresses and endpoint URLs."""

from __future__ import annotations

import pytest

from cortexd.address import HostPort, check_endpoint, parse_host_port
from cortexd.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "host", "port", "url"),
    [
        ("127.0.0.1:31313", "127.0.0.1", 31313, "http://127.0.0.1:31313"),
        ("localhost:0", "localhost", 0, "http://localhost:0"),
        ("0.0.0.0:80", "0.0.0.0", 80, "http://127.0.0.1:80"),
        ("[::]:80", "::", 80, "http://[::1]:80"),
        ("[::1]:8080", "::1", 8080, "http://[::1]:8080"),
        ("gpu-1.example.org:1", "gpu-1.example.org", 1, "http://gpu-1.example.org:1"),
    ],
)
def test_address_is_split_and_reachable(text: str, host: str, port: int, url: str) -> None:
    """An address is parsed, written back, and turned into a URL a local client can use."""
    address = parse_host_port(text)
    assert address == HostPort(host, port)
    assert str(address) == text
    assert address.url() == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "31313",
        ":31313",
        "host:",
        "host:x",
        "host:65536",
        "host:-1",
        "::1:80",
        "[x]:80",
        "a b:1",
        "http://host:1",
        "-host:1",
        "host:１",
        "host:123456",
        "[127.0.0.1]:1",
        "host:80\n",
    ],
)
def test_bad_address_says_what_is_allowed(text: str) -> None:
    """What is no host:port is refused with the form that is."""
    with pytest.raises(ConfigError, match="allowed: host:port"):
        parse_host_port(text)


def test_loopback_is_told_from_open_addresses() -> None:
    """Only addresses of this machine alone count as loopback."""
    addresses = {"127.0.0.2": True, "::1": True, "localhost": True, "0.0.0.0": False, "x": False}
    for host, expected in addresses.items():
        assert HostPort(host, 1).is_loopback is expected


@pytest.mark.parametrize(
    "text", ["http://a", "https://a.b:8443/base", "http://[::1]:1", "http://192.168.1.10:13131"]
)
def test_endpoint_is_accepted(text: str) -> None:
    """URLs of neurons pass."""
    check_endpoint(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host:1",
        "ftp://a",
        "http://",
        "http://a:x",
        "http://a:99999",
        "http://a:0",
        "http://[::1",
        "http://a?x=1",
        "http://a#x",
        "http://a b",
        "http://a\n",
    ],
)
def test_bad_endpoint_says_what_is_allowed(text: str) -> None:
    """What is no http URL is refused with the form that is."""
    with pytest.raises(ConfigError, match="allowed: http"):
        check_endpoint(text)
