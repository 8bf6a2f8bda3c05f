"""Cases that only real processes and sockets show: one gateway in front of a scripted neuron."""

from __future__ import annotations

import http.client
import json
import resource
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cases.case import DIALECTS, PATHS, DialectName, check_answer, check_document
from tests.cases.table import CASES
from tests.tree.daemon import Daemon
from tests.tree.scripted_neuron import ScriptedNeuron
from tests.waiting import DEADLINE_S, wait_for

pytestmark = pytest.mark.tree

MODEL, EMBEDDER, HUGE = "org/warm", "org/embedder", "org/huge"
EVIL = "no/such\n\x1b[31mmodel\r{}"


@dataclass(slots=True)
class Site:
    """A gateway and its only neuron."""

    gateway: Daemon
    neuron: ScriptedNeuron

    def node(self) -> dict[str, Any]:
        """Return the gateway's view of the neuron."""
        return self.gateway.nodes()["one"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The neuron has one model loaded; the catalogue knows one for embeddings, and one too big."""
    folder = tmp_path_factory.mktemp("gateway")
    catalogue = folder / "models.toml"
    catalogue.write_text(
        f'[[models]]\nid = "{EMBEDDER}"\ncapabilities = ["embedding"]\n'
        f'[[models]]\nid = "{HUGE}"\nmin_device_vram_mb = 99000000\n'
    )
    with (
        ScriptedNeuron("one", {MODEL: "loaded"}) as neuron,
        gateway_of(
            folder,
            neuron,
            CORTEXD_MODELS_CONFIG=str(catalogue),
            CORTEXD_GATEWAY__QUEUE_WAIT_S="0.5",
        ) as gateway,
    ):
        site = Site(gateway, neuron)
        wait_for(lambda: gateway.has_healthy("one"), "seeing the neuron")
        yield site


def gateway_of(folder: Path, neuron: ScriptedNeuron, **environment: str) -> Daemon:
    """Return a gateway of one neuron, to be entered."""
    return Daemon(
        folder,
        "--role",
        "gateway",
        CORTEXD_NEURONS=f'[{{name = "one", endpoint = "{neuron.url}"}}]',
        CORTEXD_GATEWAY__FIRST_BYTE_HOLD_MS="50",
        **environment,
    )


def body(model: str, **fields: object) -> str:
    """Return a body that is good in both dialects."""
    messages = [{"role": "user", "content": "hi"}]
    return json.dumps({"model": model, "messages": messages, "max_tokens": 4, **fields})


def ask(
    gateway: Daemon, dialect: DialectName, model: str = MODEL, **fields: object
) -> tuple[int, Any, http.client.HTTPMessage]:
    """Ask; return status, document and headers."""
    connection = http.client.HTTPConnection("127.0.0.1", gateway.api_port, timeout=DEADLINE_S)
    try:
        connection.request("POST", PATHS[dialect], body(model, **fields))
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response.headers
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("number", "model", "dialect"),
    [
        pytest.param(number, model, dialect, id=f"case{number:02}-{dialect}-real")
        for number, model in ((6, "org/wram"), (7, HUGE), (9, EMBEDDER), (55, "a/b"), (56, EVIL))
        for dialect in DIALECTS
    ],
)
def test_model_is_refused(site: Site, number: int, model: str, dialect: DialectName) -> None:
    """No load is tried; names from outside reach neither log nor metrics unescaped."""
    check_answer(CASES[number], dialect, *ask(site.gateway, dialect, model))
    assert site.neuron.num_loads == 0
    log = site.gateway.log()
    assert all(line.isprintable() for line in log.split("\n"))
    _, metrics = site.gateway.get("/metrics", port=site.gateway.metrics_port)
    assert model not in metrics


@pytest.mark.parametrize(
    "dialect", [pytest.param(name, id=f"case20-{name}-real") for name in DIALECTS]
)
def test_request_is_queued_past_its_deadline(site: Site, dialect: DialectName) -> None:
    """It leaves the queue, and what holds the seat is not disturbed."""
    site.neuron.seats = 1
    wait_for(lambda: site.node()["models"][0]["max_in_flight"] == 1, "learning the seats")
    site.neuron.hold()
    before = site.neuron.num_chats
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, site.gateway, dialect)
        wait_for(lambda: site.neuron.num_chats == before + 1, "the first request's start")
        try:
            check_answer(CASES[20], dialect, *ask(site.gateway, dialect))
        finally:
            site.neuron.release()
        assert first.result()[0] == 200
    assert site.neuron.num_chats == before + 1
    site.neuron.seats = 0
    wait_for(lambda: not site.node()["models"][0]["max_in_flight"], "learning that none counts")


def test_case_54_exhausted_descriptors_are_survived(site: Site) -> None:
    """Who is connected is served on; connections beyond are shed; later all is as before."""
    front = psutil.Process(int(site.gateway.actors()["front.0"]["pid"]))
    kept = http.client.HTTPConnection("127.0.0.1", site.gateway.api_port, timeout=DEADLINE_S)
    kept.request("GET", "/livez")
    kept.getresponse().read()
    before = front.rlimit(resource.RLIMIT_NOFILE)
    room = front.num_fds() + 8
    front.rlimit(resource.RLIMIT_NOFILE, (room, before[1]))
    storm = [socket.create_connection(("127.0.0.1", site.gateway.api_port)) for _ in range(40)]
    try:
        wait_for(lambda: front.num_fds() >= room - 1, "running out of descriptors")
        kept.request("GET", "/livez")
        assert kept.getresponse().read()
    finally:
        for connection in storm:
            connection.close()
        kept.close()
    wait_for(lambda: front.num_fds() < room - 4, "giving the descriptors back")
    front.rlimit(resource.RLIMIT_NOFILE, before)
    assert ask(site.gateway, "openai")[0] == 200
    assert int(site.gateway.actors()["front.0"]["pid"]) == front.pid


class Endless:
    """A server that begins an answer and never ends it."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(connection)
            asked = connection.recv(65536)
            head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: "
            if asked.startswith(b"GET"):
                models = b'{"object":"list","data":[{"id":"%s"}]}' % MODEL.encode()
                length = f"application/json\r\nContent-Length: {len(models)}\r\n\r\n"
                connection.sendall(head + length.encode() + models)
            else:
                event = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
                connection.sendall(head + b"text/event-stream\r\n\r\n" + event)

    def close(self) -> None:
        """Close all sockets."""
        self._listener.close()
        for connection in self._open:
            connection.close()


def test_case_53_shutdown_tells_open_streams(tmp_path: Path) -> None:
    """SIGTERM: nothing new, streams that outlive the drain get their error event, exit code 0."""
    node = Endless()
    settings = {
        "CORTEXD_NEURONS": f'[{{name = "one", endpoint = "{node.url}", kind = "openai"}}]',
        "CORTEXD_GATEWAY__DRAIN_S": "2",
    }
    try:
        with Daemon(tmp_path, "--role", "gateway", **settings) as gateway:
            wait_for(lambda: gateway.has_healthy("one"), "its node")
            streams: dict[DialectName, http.client.HTTPResponse] = {}
            for dialect in DIALECTS:
                connection = http.client.HTTPConnection(
                    "127.0.0.1", gateway.api_port, timeout=DEADLINE_S
                )
                connection.request("POST", PATHS[dialect], body(MODEL, stream=True))
                streams[dialect] = connection.getresponse()
                while b'"x"' not in streams[dialect].readline():
                    pass
            assert gateway.process is not None
            gateway.process.send_signal(signal.SIGTERM)
            for dialect, response in streams.items():
                last = response.read().rstrip(b"\n").rpartition(b"data: ")[2]
                check_document(CASES[53].refusal(dialect), dialect, json.loads(last))
            assert gateway.process.wait(DEADLINE_S) == 0
    finally:
        node.close()
