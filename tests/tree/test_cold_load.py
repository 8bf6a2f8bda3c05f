"""A model that takes six minutes to load, seen by clients of both dialects, streaming or not.

The clocks are scaled so that it takes half a minute: the load and both keep-alives keep their
proportions, while the bounds of the connections between client, gateway and neuron stay as they
are. `COLD_LOAD_S=360` runs it in real time, with the default keep-alives of 1 and 15 seconds.
"""

from __future__ import annotations

import json
import os
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import pytest

from tests.tree.daemon import Daemon
from tests.tree.scripted_neuron import ScriptedNeuron
from tests.waiting import DEADLINE_S, wait_for

pytestmark = [pytest.mark.tree, pytest.mark.slow]

MODEL: Final = "org/huge"
LOAD_S: Final = float(os.environ.get("COLD_LOAD_S", "24"))
SCALE: Final = LOAD_S / 360
EVENT_S: Final = 15 * SCALE
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"


@dataclass(slots=True)
class Seen:
    """The lines of an answer that are not empty, and when each came."""

    lines: list[bytes]
    times: list[float]

    def num_starting(self, *beginnings: bytes) -> int:
        """Return how many lines begin so."""
        return sum(line.startswith(beginnings) for line in self.lines)

    @property
    def largest_gap_s(self) -> float:
        """Return the longest time between two lines."""
        return max(after - before for before, after in pairwise(self.times))


def ask(gateway: Daemon, path: str, *, stream: bool) -> Seen:
    """Ask for the cold model and wait for the answer's end."""
    body = {"model": MODEL, "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
    request = urllib.request.Request(
        gateway.url(path),
        data=json.dumps({**body, "stream": stream}).encode(),
        headers={"Content-Type": "application/json"},
    )
    seen = Seen([], [time.monotonic()])
    with urllib.request.urlopen(request, timeout=LOAD_S + DEADLINE_S) as response:
        for line in response:
            if line.strip():
                seen.lines.append(line.strip())
                seen.times.append(time.monotonic())
    return seen


@pytest.mark.timeout(LOAD_S + 3 * DEADLINE_S)
def test_six_minute_load_is_waited_for_with_signs_of_life(tmp_path: Path) -> None:
    """Two streams get comments and events all the while, a unary request waits; one load."""
    catalogue = tmp_path / "models.toml"
    catalogue.write_text(f'[[models]]\nid = "{MODEL}"\n')
    with ScriptedNeuron("one", load_s=LOAD_S) as neuron:
        entry = f'[{{name = "one", endpoint = "{neuron.url}"}}]'
        with Daemon(
            tmp_path,
            "--role",
            "gateway",
            CORTEXD_NEURONS=entry,
            CORTEXD_MODELS_CONFIG=str(catalogue),
            CORTEXD_GATEWAY__KEEPALIVE_S=str(SCALE),
            CORTEXD_GATEWAY__EVENT_KEEPALIVE_S=str(EVENT_S),
        ) as gateway:
            wait_for(lambda: gateway.has_healthy("one"), "the neuron's first poll")
            with ThreadPoolExecutor(3) as pool:
                chat = pool.submit(ask, gateway, CHAT, stream=True)
                messages = pool.submit(ask, gateway, MESSAGES, stream=True)
                unary = pool.submit(ask, gateway, CHAT, stream=False)
                streams = {"chat": chat.result(), "messages": messages.result()}
                (answer,) = unary.result().lines
    assert neuron.num_loads == 1
    assert json.loads(answer)["choices"][0]["message"]["content"] == "one"
    assert streams["chat"].lines[-1] == b"data: [DONE]"
    for name, seen in streams.items():
        print(f"{name}: {len(seen.lines)} lines, largest gap {seen.largest_gap_s:.2f} s")
        num_events = seen.num_starting(b"data: {", b"event: ping")
        # 24 periods of events and 360 of comments; a busy machine may swallow half of them.
        assert num_events >= 12, seen.lines
        assert seen.num_starting(b": loading") >= 90
