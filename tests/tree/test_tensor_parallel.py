"""A model over several real rank processes: the same service as one rank, whatever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest

from cortexd.errors import CortexError
from tests.tree.daemon import Daemon, streamed_text
from tests.tree.tiny_model import CONTEXT, LONG, make_tiny_model
from tests.waiting import DEADLINE_S, wait_for

pytestmark = pytest.mark.tree

# What a stopped worker costs; not so short that a busy machine's steps miss it.
STEP_TIMEOUT_S = 8.0
SEED = 20
RETRIABLE = {"engine_restarting", "model_load_failed", "model_loading"}
PROMPTS = [f"question {number} " + "word " * (7 * number) for number in range(4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Qwen3: 4 query heads, 2 KV heads."""
    folder = tmp_path_factory.mktemp("models") / "tiny-qwen3"
    return str(make_tiny_model(folder, architecture="qwen3"))


@pytest.fixture(scope="module")
def answers(model: str, daemon: Daemon) -> list[str]:
    """What one rank answers."""
    assert _load(daemon, model, tensor_parallel=1)[0] == 200
    found = [_ask(daemon, model, prompt) for prompt in PROMPTS]
    assert daemon.post("/models/unload", {"model_id": model}, port=daemon.neuron_port)[0] == 200
    return found


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon without a model."""
    settings = {"CORTEXD_SUPERVISION__MAX_GROUP_RESTARTS": "20"}
    with Daemon(tmp_path_factory.mktemp("daemon"), **settings) as running:
        yield running


@pytest.fixture
def hasty(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon without a model, whose steps may not take long: that ends a stopped worker."""
    with Daemon(
        tmp_path,
        CORTEXD_SUPERVISION__STEP_TIMEOUT_S=str(STEP_TIMEOUT_S),
        CORTEXD_SUPERVISION__MAX_GROUP_RESTARTS="20",
    ) as running:
        yield running


@pytest.fixture(scope="module")
def split(daemon: Daemon, model: str, answers: list[str]) -> Daemon:
    """The daemon with the model on two ranks."""
    status, answer = _load(daemon, model, tensor_parallel=2, devices=[0, 1])
    assert status == 200, answer
    return daemon


def _load(daemon: Daemon, model: str, **options: object) -> tuple[int, Any]:
    return daemon.post("/models/load", {"model_id": model, **options}, port=daemon.neuron_port)


def _ask(daemon: Daemon, model: str, prompt: str) -> str:
    status, answer = daemon.chat(model, prompt, max_tokens=12)
    assert status == 200, answer
    return str(answer["choices"][0]["message"]["content"])


def _rank(daemon: Daemon, rank: int) -> str:
    return next(
        name for name, actor in daemon.actors().items() if actor["group"] and actor["rank"] == rank
    )


def test_split_model_follows_a_grammar(split: Daemon, model: str) -> None:
    """Masks live where tokens are chosen: on the first rank alone."""
    schema = {"enum": ["north", "south", {"x": 1}]}
    status, answer = split.chat(model, "where?", max_tokens=40, guided_json=schema)
    assert status == 200, answer
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert json.loads(choice["message"]["content"]) in schema["enum"]


def test_two_ranks_answer_as_one_streamed_and_together(
    split: Daemon, model: str, answers: list[str]
) -> None:
    """Greedy text is equal alone, streamed, and in a batch."""
    assert [_ask(split, model, prompt) for prompt in PROMPTS] == answers
    streamed = streamed_text(list(split.stream(model, PROMPTS[0], max_tokens=12)))
    assert streamed == answers[0]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompt: _ask(split, model, prompt), PROMPTS))
    assert together == answers
    status = split.models()[model]
    assert status["tensor_parallel"] == 2
    assert status["devices"] == [0, 1]
    assert not list(split.runtime_dir.glob("*.meet"))


def test_abandoned_stream_frees_its_seat_on_all_ranks(
    split: Daemon, model: str, answers: list[str]
) -> None:
    """A client that goes away cancels; the next answer is right."""
    stream = split.stream(model, "hello", max_tokens=LONG, ignore_eos=True)
    next(stream)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    wait_for(lambda: split.models()[model]["in_flight"] == 0, "the lease being closed")
    assert _ask(split, model, PROMPTS[0]) == answers[0]


@pytest.mark.parametrize("rank", [1, 0])
def test_killed_rank_ends_streams_retriably_and_the_group_is_back(
    split: Daemon, model: str, answers: list[str], rank: int
) -> None:
    """The stream gets an error event that may be retried, and then the same answer."""
    stream = split.stream(model, "hello", max_tokens=LONG, ignore_eos=True)
    events: list[Any] = [next(stream), next(stream)]
    split.kill(_rank(split, rank))
    events += list(stream)
    assert events[-1]["error"]["code"] == "engine_restarting"
    split.wait_loaded(model)
    assert _ask(split, model, PROMPTS[0]) == answers[0]


def test_stopped_worker_misses_the_step_deadline_and_the_group_is_back(
    hasty: Daemon, model: str, answers: list[str]
) -> None:
    """A rank that hangs in a collective ends the group, not the service."""
    assert _load(hasty, model, tensor_parallel=2, devices=[0, 1])[0] == 200
    stream = hasty.stream(model, "hello", max_tokens=LONG, ignore_eos=True)
    events: list[Any] = [next(stream), next(stream)]
    os.kill(int(hasty.actors()[_rank(hasty, 1)]["pid"]), signal.SIGSTOP)
    events += list(stream)
    assert events[-1]["error"]["code"] == "engine_restarting"
    hasty.wait_loaded(model)
    assert _ask(hasty, model, PROMPTS[0]) == answers[0]


def test_bad_request_does_not_harm_the_group(split: Daemon, model: str, answers: list[str]) -> None:
    """A prompt that is too long is that client's error; the same processes go on."""
    pids = [split.actors()[_rank(split, rank)]["pid"] for rank in (0, 1)]
    assert split.chat(model, "word " * CONTEXT)[0] == 400
    assert _ask(split, model, PROMPTS[1]) == answers[1]
    assert [split.actors()[_rank(split, rank)]["pid"] for rank in (0, 1)] == pids


def test_world_size_that_does_not_divide_is_refused_before_any_process(
    split: Daemon, tmp_path: Path
) -> None:
    """The error names the quantity and what is allowed."""
    other = str(make_tiny_model(tmp_path / "other"))
    status, answer = _load(split, other, tensor_parallel=3)
    assert status == 400, answer
    assert "num_attention_heads = 4" in answer["error"]["message"]
    assert "allowed for this model: 1, 2, 4" in answer["error"]["message"]
    assert other not in split.models() or split.models()[other]["state"] == "failed"


@pytest.mark.parametrize("world_size", [0, 65])
def test_operator_cannot_ask_for_an_impossible_number_of_ranks(
    split: Daemon, model: str, world_size: int
) -> None:
    """The admin protocol checks what the command line would."""
    with pytest.raises(CortexError, match="tensor_parallel"):
        split.admin("model.load", model_id=model, tensor_parallel=world_size)


def test_unloaded_model_ends_all_its_ranks(split: Daemon, model: str) -> None:
    """Nothing of a split model stays."""
    status, answer = split.post("/models/unload", {"model_id": model}, port=split.neuron_port)
    assert status == 200, answer
    assert not [name for name, actor in split.actors().items() if actor["group"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        (
            "llama",
            {
                "num_attention_heads": 6,
                "num_key_value_heads": 3,
                "hidden_size": 96,
                "intermediate_size": 96,
            },
        ),
        ("qwen3", {}),
    ],
)
def test_three_and_four_ranks_answer_as_one(
    daemon: Daemon, tmp_path: Path, architecture: str, sizes: dict[str, int]
) -> None:
    """More ranks than KV heads share them; three ranks split the vocabulary unevenly."""
    model = str(make_tiny_model(tmp_path / "model", architecture=architecture, **sizes))
    found = []
    for world_size in (1, 3, 4) if sizes else (1, 4):
        status, answer = _load(daemon, model, tensor_parallel=world_size)
        if sizes and world_size == 4:  # 6 heads
            assert status == 400, answer
            break
        assert status == 200, answer
        found.append([_ask(daemon, model, prompt) for prompt in PROMPTS])
        daemon.post("/models/unload", {"model_id": model}, port=daemon.neuron_port)
    assert all(texts == found[0] for texts in found)


@pytest.mark.slow
@pytest.mark.chaos
def test_rank_lost_at_any_moment_leaves_a_group_that_answers_the_same(
    hasty: Daemon, model: str, answers: list[str]
) -> None:
    """Killed while loading or while stepping, or stopped: the request ends, the group is back."""
    daemon = hasty
    random = Random(SEED)
    for _ in range(8):
        if daemon.models().get(model, {}).get("state") == "loaded":
            daemon.post("/models/unload", {"model_id": model}, port=daemon.neuron_port)
        rank, delay_s = random.randrange(2), random.random() * 0.3
        signum = random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
        with ThreadPoolExecutor(1) as pool:
            if random.random() < 0.5:
                signum = signal.SIGKILL  # the start's own deadline ends a stopped one, much later
                ended = pool.submit(_load, daemon, model, tensor_parallel=2)
            else:
                assert _load(daemon, model, tensor_parallel=2)[0] == 200
                events = daemon.stream(model, "hello", max_tokens=400, ignore_eos=True)
                ended = pool.submit(lambda events=events: (200, list(events)[-1]))
            time.sleep(delay_s)  # the moment is the test's subject
            for actor in daemon.actors().values():
                if actor["group"] and actor["rank"] == rank and actor["pid"]:
                    os.kill(actor["pid"], signum)
            _, last = ended.result(timeout=DEADLINE_S)
        daemon.wait_loaded(model)
        assert last == "[DONE]" or "error" not in last or last["error"]["code"] in RETRIABLE, last
        assert _ask(daemon, model, PROMPTS[0]) == answers[0]


def test_doctor_tries_every_stage_and_leaves_nothing(tmp_path: Path) -> None:
    """Spawn, ping, init, sanity, shutdown; two ranks on the CPU."""
    done = subprocess.run(
        [sys.executable, "-m", "cortexd", "doctor", "--tp", "2"],
        env={**os.environ, "TMPDIR": "/tmp", "CORTEXD_ENGINE__DEVICE": "cpu"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    stages = [line.partition(":")[0] for line in done.stdout.splitlines()]
    expected = (
        "spawn device cpu kernels ping init sanity memory free on the workers shutdown status=ok"
    )
    assert " ".join(stages) == expected
    assert done.stderr == ""
