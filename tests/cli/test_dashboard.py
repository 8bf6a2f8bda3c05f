"""The dashboard's screen, from the answers of the admin socket."""

from __future__ import annotations

import io
import os
import sys
import termios
from collections import deque
from pathlib import Path

import pytest
from rich.console import Console

from cli.dashboard import look, render
from cli.keypress import quit_key
from cli.main import main
from tests.tree.daemon import Daemon
from tests.waiting import DEADLINE_S, wait_for

STATUS: dict[str, object] = {
    "version": "0.1.0",
    "state": "ok",
    "role": "all",
    "uptime_s": 12.0,
    "listen": {"api": "127.0.0.1:31313"},
    "actors": [{"name": "router", "state": "ready", "pid": 7, "restarts": 2, "rss_bytes": 2**20}],
    "models": [
        {"model_id": "org/big", "state": "loading", "progress": 0.5, "stage": "loading weights"},
        {"model_id": "org/small", "state": "loaded", "memory_bytes": 2**30},
    ],
}
HOST: dict[str, object] = {
    "devices": [
        {
            "index": 0,
            "kind": "cuda",
            "name": "GPU",
            "memory_total_bytes": 2**34,
            "utilization_pct": 7,
        }
    ],
    "loads": [
        {
            "model_id": "org/small",
            "num_running": 3,
            "num_waiting": 1,
            "tok_s_prefill": 900.0,
            "tok_s_decode": 55.5,
            "kv_blocks_used": 1,
            "kv_blocks_total": 4,
        }
    ],
}


def screen(
    status: dict[str, object],
    host: dict[str, object],
    *events: dict[str, object],
    size: tuple[int, int] = (140, 50),
) -> str:
    """Return the rendered text of a terminal with so many columns and lines."""
    width, height = size
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(render(status, host, deque(events), height=height))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_screen_shows_models_with_load_devices_actors_and_events() -> None:
    """One look tells what runs, how loaded it is and what happened."""
    event: dict[str, object] = {"event": "actor.ready", "time": 0, "fields": {"actor": "router"}}
    text = screen(STATUS, HOST, event)
    for expected in (
        "loading weights 50 %",
        "1.0 GiB",
        "900 tok/s",
        "55.5 tok/s",
        "25 %",
        "cuda:0",
        "16.0 GiB",
        "router",
        "actor.ready actor=router",
    ):
        assert expected in text


def test_screen_of_a_gateway_shows_the_models_of_its_nodes() -> None:
    """With what each node says of them; a failure's reason stands below."""
    here = {"model_id": "org/big", "state": "loaded", "memory_mib": 2048, "in_flight": 3}
    here |= {"queue_depth": 9, "tok_s_prefill": 900.0, "tok_s_decode": 55.5}
    gone = {"model_id": "org/gone", "state": "failed", "detail": "no such file"}
    beast = {"name": "beast", "is_healthy": True, "models": [here, gone]}
    away = {"name": "benjy", "is_healthy": False, "models": [here]}
    status = {**STATUS, "role": "gateway", "models": [], "nodes": [beast, away]}
    text = screen(status, {"devices": []})
    row = next(line for line in text.splitlines() if "org/big on beast" in line)
    for expected in ("loaded", "2.0 GiB", " 3 ", " 9 ", "900 tok/s", "55.5 tok/s"):
        assert expected in row
    assert "org/gone on beast: no such file" in text
    assert "on benjy" not in text
    assert text.count("tok/s") == 2  # of the failed one nothing is known
    text = screen({**status, "nodes": [away]}, {"devices": []})
    assert "no models; these neurons do not answer: benjy" in text


def test_screen_is_drawn_while_actors_are_away() -> None:
    """A restarting router or poller is said, and the rest is shown."""
    text = screen(
        {**STATUS, "models": None, "models_error": "no answer"}, {"error": 'actor "poller" is down'}
    )
    assert "unknown: no answer" in text
    assert 'unknown: actor "poller" is down' in text
    assert "router" in text


def test_long_error_leaves_the_columns_their_room() -> None:
    """One model that failed does not hide what the others do."""
    failed = {"model_id": "org/gone", "state": "failed", "error": "the hub is away " * 20}
    models = [STATUS["models"][1], failed]  # type: ignore[index]
    text = screen({**STATUS, "models": models}, HOST)
    for expected in ("1.0 GiB", "55.5 tok/s", "org/small", "org/gone: the hub is away"):
        assert expected in text


def test_small_terminal_shows_what_is_not_well_and_the_last_events() -> None:
    """All panels fit 80 columns and 24 lines; actors that are ready give way, no number does."""
    names = [f"front.{index}" for index in range(16)]
    actors = [{"name": name, "state": "ready", "pid": 123456, "restarts": 1} for name in names]
    actors[9]["state"] = "exited"
    actors[9]["name"] = "a-model-with-a-very-long-name-of-its-own-4b-instruct-2507-8ccac9/0"
    events: list[dict[str, object]] = [
        {"event": "actor.ready", "time": 0, "fields": {"actor": name}} for name in names
    ]
    text = screen({**STATUS, "actors": actors}, HOST, *events, size=(80, 24))
    assert len(text.splitlines()) <= 24
    for expected in ("exited", "123456", "and 11 more", "actor=front.15", "q quits"):
        assert expected in text


@pytest.mark.parametrize(("keys", "is_over"), [(b"q", True), (b"x", False)])
def test_q_ends_the_screen_and_leaves_the_terminal_as_it_was(
    keys: bytes, is_over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys come without a line end; another one only redraws."""
    ours, theirs = os.openpty()
    before = termios.tcgetattr(theirs)
    with os.fdopen(ours, "wb", buffering=0) as keyboard, os.fdopen(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        with quit_key() as wait:
            assert wait(0) is False
            keyboard.write(keys)
            assert wait(DEADLINE_S) is is_over
        assert termios.tcgetattr(terminal.fileno()) == before


def test_foreign_text_cannot_control_the_terminal() -> None:
    """Names and errors come from outside."""
    model = {"model_id": "evil\x1b[2J", "state": "failed", "error": "bad\x1b]0;title\x07"}
    assert "\x1b" not in screen({**STATUS, "models": [model]}, HOST)


def test_top_without_a_terminal_names_the_other_way(capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts are sent to `status --json`."""
    assert main(["top"]) == 1
    assert "status --json" in capsys.readouterr().err


@pytest.mark.tree
def test_look_reads_a_real_daemon(tmp_path: Path) -> None:
    """The three operations exist and have the fields that the screen shows."""
    from actors.transport.admin_channel import AdminChannel

    with (
        Daemon(tmp_path) as daemon,
        AdminChannel(daemon.runtime_dir / "admin.s", timeout_s=DEADLINE_S) as channel,
    ):
        events: deque[dict[str, object]] = deque()
        look(channel, events)
        assert events

        def complete() -> str | None:
            """Return the screen, once nobody was too busy to answer."""
            text = screen(*look(channel, events), *events)
            return None if "unknown" in text else text

        text = wait_for(complete, "every actor's answer")
        assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    assert text is not None
    assert "front.0" in text
    assert "cpu:0" in text or "cuda:0" in text
