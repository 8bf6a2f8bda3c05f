"""Every request ends in exactly one log line and one count, whatever its ending."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.tree.daemon import Daemon
from tests.tree.tiny_model import CONTEXT, LONG
from tests.waiting import DEADLINE_S, wait_for

pytestmark = pytest.mark.tree

_COUNT = re.compile(r"^cortex_requests_total\{[^}]*\} (\S+)$", re.MULTILINE)
CHAT = "/v1/chat/completions"


def counted(daemon: Daemon) -> float:
    """Return how many requests metrics has counted."""
    _, text = daemon.get("/metrics", port=daemon.metrics_port)
    return sum(map(float, _COUNT.findall(text)))


def lines(daemon: Daemon) -> list[dict[str, Any]]:
    """Return the terminal line of every request so far."""
    found = [line for line in daemon.log().splitlines() if '"request.finished"' in line]
    return [json.loads(line[line.index("{") :]) for line in found]


def send(daemon: Daemon, request_id: str, body: Any, path: str = CHAT) -> http.client.HTTPResponse:
    """Send a request and return its answer, unread."""
    connection = http.client.HTTPConnection("127.0.0.1", daemon.api_port, timeout=DEADLINE_S)
    data = body if isinstance(body, bytes) else json.dumps(body)
    connection.request("POST", path, data, {"x-request-id": request_id})
    return connection.getresponse()


def body(model: str, **fields: Any) -> dict[str, Any]:
    """Return a request's body."""
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], **fields}


def leave(daemon: Daemon, request_id: str, **fields: Any) -> None:
    """Begin a request and close the connection without waiting for its end."""
    before = running(daemon)  # the one that was left before this may not have ended
    connection = http.client.HTTPConnection("127.0.0.1", daemon.api_port, timeout=DEADLINE_S)
    connection.request("POST", CHAT, json.dumps(fields), {"x-request-id": request_id})
    if fields.get("stream"):
        response = connection.getresponse()
        response.readline()
        response.close()
    else:
        wait_for(lambda: running(daemon) - before, "the request's start")
    connection.close()


def running(daemon: Daemon) -> set[str]:
    """Return the leases of the requests that run."""
    return {one["request_id"] for one in daemon.admin("requests")["requests"]}


def test_each_ending_leaves_one_line_and_one_count(daemon: Daemon, tiny_model: Any) -> None:
    """Good, refused, wrong, unknown, too long, left in the middle: one of each, no more."""
    model = str(tiny_model)
    before, old = counted(daemon), len(lines(daemon))
    endless = {"max_tokens": LONG, "ignore_eos": True}
    endings: dict[str, Callable[[str], object]] = {
        "unary": lambda name: send(daemon, name, body(model, max_tokens=2)).read(),
        "stream": lambda name: send(daemon, name, body(model, max_tokens=2, stream=True)).read(),
        "messages": lambda name: send(
            daemon, name, body(model, max_tokens=2), "/v1/messages"
        ).read(),
        "counting": lambda name: send(
            daemon, name, body(model), "/v1/messages/count_tokens"
        ).read(),
        "not-json": lambda name: send(daemon, name, b"{").read(),
        "bad-value": lambda name: send(daemon, name, body(model, temperature=-1)).read(),
        "unknown": lambda name: send(daemon, name, body("no/such")).read(),
        "too-long": lambda name: send(
            daemon, name, {"model": model, "prompt": "word " * CONTEXT}, "/v1/completions"
        ).read(),
        "left-stream": lambda name: leave(daemon, name, **body(model, stream=True, **endless)),
        "left-unary": lambda name: leave(daemon, name, **body(model, **endless)),
    }
    for name, end in endings.items():
        end(name)
    wait_for(lambda: len(lines(daemon)) == old + len(endings), "one line each")
    wait_for(lambda: counted(daemon) == before + len(endings), "one count each")
    time.sleep(0.2)  # a second one would come at once
    assert Counter(line["id"] for line in lines(daemon)[old:]) == Counter(endings.keys())
    assert counted(daemon) == before + len(endings)
    status = {line["id"]: line["status"] for line in lines(daemon)[old:]}
    assert [status[name] for name in endings] == [
        *[200] * 4,
        *[400] * 2,
        404,
        400,
        499,
        499,
    ]


def test_requests_of_a_killed_front_are_accounted_for(daemon: Daemon, tiny_model: Any) -> None:
    """The router writes the line that the front cannot write any more, even one started since."""
    before, old = counted(daemon), len(lines(daemon))
    endless = body(str(tiny_model), stream=True, max_tokens=LONG, ignore_eos=True)
    answers = [send(daemon, f"r{number}", endless) for number in range(3)]
    for answer in answers:
        answer.readline()
    daemon.kill("router")
    front = daemon.kill("front.0")
    wait_for(lambda: len(lines(daemon)) == old + 3, "a line each")
    assert {line["id"] for line in lines(daemon)[old:]} == {"r0", "r1", "r2"}
    wait_for(lambda: counted(daemon) == before + 3, "a count each")
    assert {line["error"] for line in lines(daemon)[old:]} == {"front_crashed"}
    for answer in answers:
        answer.close()
    daemon.wait_back("front.0", front)
