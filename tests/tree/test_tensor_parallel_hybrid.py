"""Hybrid models over two real ranks, through HTTP: everything that one rank does, and the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.tree.daemon import Daemon, streamed_text
from tests.tree.tiny_model import LONG, make_tiny_model
from tests.waiting import wait_for

pytestmark = pytest.mark.tree

# More than a block, so that a snapshot is kept and the last question takes it up.
SYSTEM = "you are a fox that jumps over the lazy dog; " * 3
QUESTIONS = [SYSTEM + f"question {number} " + "word " * number for number in range(4)]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon without a model."""
    with Daemon(tmp_path_factory.mktemp("daemon"), CORTEXD_ENGINE__BLOCK_SIZE="16") as running:
        yield running


def _answers(daemon: Daemon, model: str) -> list[str]:
    found = []
    for question in QUESTIONS:
        status, answer = daemon.chat(model, question, max_tokens=10, ignore_eos=True)
        assert status == 200, answer
        found.append(str(answer["choices"][0]["message"]["content"]))
    return found


def _cached_tokens(daemon: Daemon, model: str, question: str) -> int:
    _, answer = daemon.chat(model, question, max_tokens=2)
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize("architecture", ["qwen3_5", "qwen3_next"])
def test_hybrid_over_two_ranks_is_served_as_over_one(
    daemon: Daemon, architecture: str, tmp_path: Path
) -> None:
    """Listed, streamed, batched, cached, cancelled, metered, unloaded; the same greedy text."""
    model = str(make_tiny_model(tmp_path / architecture, architecture=architecture))
    port = daemon.neuron_port
    assert daemon.post("/models/load", {"model_id": model}, port=port)[0] == 200
    expected = _answers(daemon, model)
    assert daemon.post("/models/unload", {"model_id": model}, port=port)[0] == 200

    status, answer = daemon.post(
        "/models/load", {"model_id": model, "tensor_parallel": 2}, port=port
    )
    assert status == 200, answer
    assert model in daemon.get("/v1/models")[1]
    assert daemon.models()[model]["tensor_parallel"] == 2
    assert _answers(daemon, model) == expected
    assert _cached_tokens(daemon, model, QUESTIONS[0]) >= 16
    assert _answers(daemon, model) == expected, "from the states that were kept"

    streamed = list(daemon.stream(model, QUESTIONS[1], max_tokens=10, ignore_eos=True))
    assert streamed_text(streamed) == expected[1]
    with ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(daemon.chat, model, question, max_tokens=10, ignore_eos=True)
            for question in QUESTIONS
        ]
        together = [future.result()[1]["choices"][0]["message"]["content"] for future in asked]
    assert together == expected

    stream = daemon.stream(model, "hello", max_tokens=LONG, ignore_eos=True)
    next(stream)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    wait_for(lambda: daemon.models()[model]["in_flight"] == 0, "the lease being closed")
    assert _answers(daemon, model) == expected

    line = re.compile(
        rf'^cortex_model_tok_s_decode{{[^}}]*model="{re.escape(model)}"[^}}]*}} [1-9]', re.MULTILINE
    )
    wait_for(
        lambda: line.search(daemon.get("/metrics", port=daemon.metrics_port)[1]), "its metrics"
    )
    assert daemon.post("/models/unload", {"model_id": model}, port=port)[0] == 200
    assert not [name for name, actor in daemon.actors().items() if actor["group"]]
