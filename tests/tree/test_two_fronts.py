"""Two fronts on one listener: each can do without the other."""

from __future__ import annotations

import http.client
from pathlib import Path

import pytest

from tests.tree.daemon import Daemon
from tests.tree.ports import free_port
from tests.waiting import DEADLINE_S

pytestmark = pytest.mark.tree

NUM_REQUESTS = 20


def answers(gateway: Daemon) -> int:
    """Open connections that stay open, one request on each; return how many were answered."""
    connections = [
        http.client.HTTPConnection("127.0.0.1", gateway.api_port, timeout=DEADLINE_S)
        for _ in range(NUM_REQUESTS)
    ]
    try:
        for connection in connections:
            connection.request("GET", "/livez")
        return sum(connection.getresponse().status == 200 for connection in connections)
    finally:
        for connection in connections:
            connection.close()


def test_either_front_serves_all_while_the_other_is_gone(tmp_path: Path) -> None:
    """A stopped front, that seems to have no connections, and a killed one hold nobody up."""
    settings = {
        "CORTEXD_GATEWAY__FRONTS": "2",
        "CORTEXD_NEURONS": f'[{{name = "none", endpoint = "http://127.0.0.1:{free_port()}"}}]',
    }
    with Daemon(tmp_path, "--role", "gateway", **settings) as gateway:
        for stopped, killed in (("front.0", "front.1"), ("front.1", "front.0")):
            with gateway.paused(stopped):
                assert answers(gateway) == NUM_REQUESTS
            gateway.wait_back(killed, gateway.kill(killed))
            assert answers(gateway) == NUM_REQUESTS
