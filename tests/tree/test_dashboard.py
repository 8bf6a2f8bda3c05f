"""The Grafana board: each of its queries finds what it asks for in a real scrape."""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cortexd.metrics import FAMILIES
from tests.tree.daemon import Daemon
from tests.tree.test_keys import table
from tests.tree.tiny_model import LONG
from tests.waiting import DEADLINE_S, wait_for

pytestmark = pytest.mark.tree

BOARD = Path(__file__).resolve().parents[2] / "conf" / "dashboard.json"
_METRIC = re.compile(r"\b(cortexd?_\w+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
_BY = re.compile(r"\bby \(([^)]*)\)")
_LEGEND = re.compile(r"\{\{(\w+)\}\}")
_VARIABLE = re.compile(r"label_values\((\w+), (\w+)\)")
# What a neuron with a GPU says; the test's own host has none, and so no temperature.
NEURON: dict[str, Any] = {
    "/models": [{"id": "org/far", "status": "loaded"}],
    "/discovery": {"devices": [{"index": 0, "vram_total_mb": 8000}]},
    "/health": {
        "devices": [{"index": 0, "vram_free_mb": 5000, "utilization_pct": 7.0, "temp_c": 41.0}],
        "models": [{"id": "org/far", "in_flight": 1, "max_in_flight": 4, "max_queue_depth": 8}],
    },
}


@contextmanager
def gpu_neuron() -> Iterator[str]:
    """Serve the answers of a neuron with a GPU."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Keep the test's output clean."""

        def do_GET(self) -> None:
            body = json.dumps(NEURON.get(self.path, {})).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def scrape(daemon: Daemon) -> dict[str, set[str]]:
    """Return the label names of every exported sample, by its name."""
    _, text = daemon.get("/metrics", port=daemon.metrics_port)
    return {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def make_traffic(daemon: Daemon, model: str) -> None:
    """Let every kind of thing happen that the board shows."""
    assert daemon.chat(model, "hello", max_tokens=4)[0] == 200
    assert daemon.chat("no/such-model", "hello")[0] == 404
    assert ask_as(daemon, "rich", model) == 200
    assert ask_as(daemon, "poor", model) == 429
    leave_a_stream(daemon, model)
    with ThreadPoolExecutor(6) as pool:
        statuses = list(
            pool.map(
                lambda n: daemon.chat(model, f"q{n}", max_tokens=1000, ignore_eos=True)[0], range(6)
            )
        )
    assert set(statuses) - {200}, "one seat and one place in the queue were enough for six"
    body = {"model_id": model}
    assert daemon.post("/models/unload", body, port=daemon.neuron_port)[0] == 200
    assert daemon.chat(model, "hello", max_tokens=4)[0] == 200
    daemon.wait_back("poller", daemon.kill("poller"))


def ask_as(daemon: Daemon, key: str, model: str) -> int:
    """Ask one question with a key; return the status."""
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    connection = http.client.HTTPConnection("127.0.0.1", daemon.api_port, timeout=DEADLINE_S)
    connection.request("POST", "/v1/messages", json.dumps(body), {"x-api-key": key})
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status


def leave_a_stream(daemon: Daemon, model: str) -> None:
    """Begin a long answer and go away."""
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", daemon.api_port, timeout=DEADLINE_S)
    body |= {"max_tokens": LONG, "ignore_eos": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    response = connection.getresponse()
    response.readline()
    response.close()
    connection.close()


@pytest.fixture(scope="module")
def scraped(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, set[str]]]:
    """The series of a daemon to which everything has happened."""
    folder = tmp_path_factory.mktemp("board")
    keys_file = folder / "keys.toml"
    keys_file.write_text(table("rich", hard_cap=10_000) + table("poor", hard_cap=1))
    keys_file.chmod(0o600)
    with gpu_neuron() as url:
        environment = {
            "CORTEXD_ENTITLEMENTS__KEYS_FILE": str(keys_file),
            "CORTEXD_ENTITLEMENTS__REQUIRE_AUTH": "false",
            "CORTEXD_NEURONS": f'[{{name = "far", endpoint = "{url}"}}]',
            "CORTEXD_ENGINE__MAX_NUM_SEQS": "1",
            "CORTEXD_ENGINE__MAX_QUEUE_DEPTH": "1",
        }
        with Daemon(folder, "--model", str(tiny_model), **environment) as daemon:
            daemon.wait_loaded(str(tiny_model))
            make_traffic(daemon, str(tiny_model))
            wanted = {name for query in queries() for name, _ in metrics_of(query)}

            def missing() -> set[str]:
                return wanted - scrape(daemon).keys()

            try:
                wait_for(lambda: not missing(), "exporting what the board shows")
            except AssertionError as error:
                raise AssertionError(f"not exported: {sorted(missing())}") from error
            yield scrape(daemon)


def board() -> dict[str, Any]:
    """Return the board."""
    document: dict[str, Any] = json.loads(BOARD.read_text())
    return document


def targets() -> list[dict[str, Any]]:
    """Return every query with its legend."""
    return [target for panel in board()["panels"] for target in panel.get("targets", [])]


def queries() -> list[str]:
    """Return every query."""
    return [target["expr"] for target in targets()]


def metrics_of(query: str) -> list[tuple[str, set[str]]]:
    """Return each metric of a query with the labels it is matched by."""
    return [(found[1], set(_MATCHER.findall(found[2] or ""))) for found in _METRIC.finditer(query)]


def test_every_query_finds_its_series_and_labels(scraped: dict[str, set[str]]) -> None:
    """Names, matchers, groupings and legends are those of what is exported."""
    assert len(queries()) > 30
    for target in targets():
        query = target["expr"]
        groups = [set(re.findall(r"\w+", names)) for names in _BY.findall(query)]
        assert metrics_of(query), query
        for name, matched in metrics_of(query):
            labels = scraped[name]
            assert matched <= labels, (query, labels)
            assert all(group <= labels for group in groups), (query, labels)
            shown = set(_LEGEND.findall(target["legendFormat"]))
            assert shown <= (groups[0] if groups else labels), (query, target["legendFormat"])
        is_sum = "sum(" in query or "sum by" in query or "histogram_quantile" in query
        assert is_sum or not groups


def test_variables_can_be_filled(scraped: dict[str, set[str]]) -> None:
    """Each drop-down asks for a label of an exported metric; the data source is chosen."""
    variables = {one["name"]: one for one in board()["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    for name, variable in variables.items():
        if name == "datasource":
            continue
        found = _VARIABLE.fullmatch(variable["definition"])
        assert found is not None
        assert found[2] in scraped[found[1]]
    used = set(re.findall(r"\$(\w+)", json.dumps(board()))) - {"__rate_interval", "__all"}
    assert used <= variables.keys()
    assert '"uid": "${datasource}"' in BOARD.read_text()


def test_histograms_are_read_by_their_buckets_and_counters_by_their_rate() -> None:
    """The two usual ways to a panel that shows nonsense."""
    kinds = {family.name: family.kind for family in FAMILIES}
    for query in queries():
        for name, _ in metrics_of(query):
            if name.endswith("_bucket"):
                assert kinds[name.removesuffix("_bucket")] == "histogram"
                assert "histogram_quantile" in query
            elif name.endswith("_total"):
                assert re.search(rf"(rate|increase)\({name}\b", query), query


def test_panels_do_not_overlap() -> None:
    """An importable board: unique ids, each place taken once."""
    panels = board()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
