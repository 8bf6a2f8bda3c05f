"""Fifty streaming requests for a model that is loaded nowhere: how often it is loaded, who waits.

A gateway and a neuron, both of ours, and the built-in demo model, its file in the page cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import uvloop

from bench.gateway import metrics_text, targets
from bench.gateway.figures import quantile
from bench.machine import demo_file
from bench.servers import free_port, wait_until
from cortexd.demo import DEMO_MODEL

_NUM_REQUESTS: Final = 50
_LOADS: Final = "cortex_model_loads_total"
_TIMEOUT_S: Final = 60.0
_DAEMON: Final = """
role = "{role}"
{top}
[gateway]
listen = "127.0.0.1:{api}"
metrics_listen = "127.0.0.1:{metrics}"
fronts = 1
[neuron]
listen = "127.0.0.1:{neuron}"
[paths]
runtime_dir = "{folder}/run"
state_dir = "{folder}/state"
{tables}
"""


@dataclass(slots=True, frozen=True)
class _Seen:
    """What one client saw; seconds since its request."""

    first_byte_s: float  # of the body: a comment of the gateway, or an event
    first_token_s: float


def measure_cold(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Ask, unload, ask again; print the loads and the waits; return the worst."""
    demo_file()  # a download is not what is measured
    num_loads, first_bytes_s = 0.0, []
    with _fleet(folder) as (api, neuron, metrics):
        for number in range(options.cold_rounds):
            before = metrics_text.total(metrics_text.scrape(metrics), _LOADS)
            seen = uvloop.run(_ask_all(api))
            loads = metrics_text.total(metrics_text.scrape(metrics), _LOADS) - before
            num_loads = max(num_loads, loads)
            waits = [one.first_byte_s for one in seen]
            first_bytes_s += waits
            tokens = [one.first_token_s for one in seen]
            print(
                f"round {number + 1}: {loads:.0f} load(s) for {len(seen)} requests; first byte "
                f"p50 {quantile(waits, 0.5):.2f}, max {max(waits):.2f} s; first token p50 "
                f"{quantile(tokens, 0.5):.2f}, max {max(tokens):.2f} s"
            )
            _unload(neuron, api)
    return {"cold loads": num_loads, "cold first byte s": max(first_bytes_s)}


@contextmanager
def _fleet(folder: Path) -> Iterator[tuple[int, int, int]]:
    """Run both; yield the ports of the gateway's API, of the neuron and of its metrics."""
    catalogue = folder / "models.toml"
    catalogue.write_text(f'[[models]]\nid = "{DEMO_MODEL}"\n')
    api, neuron, metrics = free_port(), free_port(), free_port()
    node = f'[[neurons]]\nname = "one"\nendpoint = "http://127.0.0.1:{neuron}"\n'
    with (
        targets.running(
            _command(folder / "neuron", "neuron", 0, neuron, metrics), neuron, "/livez"
        ),
        targets.running(
            _command(
                folder / "gateway",
                "gateway",
                api,
                0,
                0,
                top=f'models_config = "{catalogue}"',
                tables=node,
            ),
            api,
            "/livez",
        ),
    ):
        _wait_until_cold(api)
        yield api, neuron, metrics


def _command(
    folder: Path, role: str, api: int, neuron: int, metrics: int, *, top: str = "", tables: str = ""
) -> list[str]:
    folder.mkdir()
    config = folder / "cortex.toml"
    text = _DAEMON.format(
        role=role, top=top, api=api, neuron=neuron, metrics=metrics, folder=folder, tables=tables
    )
    config.write_text(text)
    return [sys.executable, "-m", "cortexd", "start", "--config", str(config)]


async def _ask_all(port: int) -> list[_Seen]:
    return await asyncio.gather(*(_ask(port) for _ in range(_NUM_REQUESTS)))


async def _ask(port: int) -> _Seen:
    """Stream a short answer. Raises: RuntimeError when it does not end well."""
    document = {
        "model": DEMO_MODEL,
        "max_tokens": 2,
        "stream": True,
        "messages": [{"role": "user", "content": "Hello"}],
    }
    body = json.dumps(document).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    started = time.perf_counter()
    writer.write(head.encode() + body)
    answer, first_byte_s, first_token_s = b"", 0.0, 0.0
    while data := await asyncio.wait_for(reader.read(65536), _TIMEOUT_S):
        answer += data
        now_s = time.perf_counter() - started
        if not first_byte_s and answer.partition(b"\r\n\r\n")[2]:
            first_byte_s = now_s
        if not first_token_s and b'"delta"' in answer:
            first_token_s = now_s
    writer.close()
    if b"data: [DONE]" not in answer:
        raise RuntimeError(f"a stream ended with {answer[-300:]!r}")
    return _Seen(first_byte_s, first_token_s)


def _unload(neuron: int, api: int) -> None:
    """Unload the model, and wait until the gateway has seen it."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{neuron}/models/unload",
        data=json.dumps({"model_id": DEMO_MODEL}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        answer.read()
    _wait_until_cold(api)


def _wait_until_cold(api: int) -> None:
    """Wait until the gateway knows that the neuron could hold the model and does not."""

    def is_cold() -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{api}/v1/models", timeout=5) as answer:
            models = json.load(answer)["data"]
        return any(
            model["id"] == DEMO_MODEL
            and model["feasible_on"] == ["one"]
            and all(place["status"] == "unloaded" for place in model["locations"])
            for model in models
        )

    wait_until(is_cold, "a neuron without the model", timeout_s=_TIMEOUT_S, period_s=0.1)
