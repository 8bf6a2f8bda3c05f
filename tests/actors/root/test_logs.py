"""Rings, wrapping, rate limit and the rotating file."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.root.log_file import RotatingFile
from actors.root.logs import RING_LINES, LineSplitter, LogHub, RateLimit, json_line
from cortexd.settings import Logging
from tests.waiting import DEADLINE_S


@given(st.binary(max_size=400), st.integers(1, 40))
def test_line_splitter_pieces_do_not_matter(data: bytes, size: int) -> None:
    """The same lines come out however a pipe cuts them."""
    splitter = LineSplitter()
    lines = [
        line
        for start in range(0, len(data), size)
        for line in splitter.push(data[start : start + size])
    ]
    assert lines + splitter.flush() == [line for line in data.split(b"\n") if line.strip()]


def test_line_splitter_endless_line_is_cut() -> None:
    """A child that never ends its line costs bounded memory."""
    splitter = LineSplitter()
    lines = [line for _ in range(10) for line in splitter.push(b"x" * 60000)]
    assert sum(map(len, lines)) >= 480000


@given(st.binary(max_size=100))
def test_json_line_is_always_one_json_object(line: bytes) -> None:
    """Whatever a library prints becomes a line of the log."""
    wrapped = json_line(line, "a", 1, 0.0)
    assert b"\n" not in wrapped.strip(b"\n") or line.startswith(b"{")
    assert isinstance(msgspec.json.decode(wrapped), dict)


def test_json_line_of_our_logger_passes_as_it_is() -> None:
    """Only foreign text is wrapped."""
    ours = b'{"event":"x","level":"info"}'
    assert json_line(ours, "a", 1, 0.0) == ours
    wrapped = msgspec.json.decode(json_line(b"{not json", "a", 1, 0.0))
    assert wrapped == {
        "event": "output",
        "level": "info",
        "time": "1970-01-01T00:00:00.000Z",
        "actor": "a",
        "pid": 1,
        "text": "{not json",
    }


def test_rate_limit_refuses_a_flood_and_recovers() -> None:
    """A burst passes, a flood is counted, a pause fills the bucket again."""
    limit = RateLimit(10.0, 20.0, now_s=0.0)
    assert sum(limit.admits(0.0) for _ in range(50)) == 20
    assert limit.num_suppressed == 30
    assert sum(limit.admits(1.0) for _ in range(50)) == 10


def _file(path: Path, failures: list[OSError], now: list[float], max_bytes: int) -> RotatingFile:
    return RotatingFile(
        path,
        max_bytes=max_bytes,
        max_files=3,
        now_s=lambda: now[0],
        on_failure=failures.append,
    )


def test_rotating_file_keeps_so_many_files_of_so_many_bytes(tmp_path: Path) -> None:
    """The newest lines are kept, whole."""
    path = tmp_path / "logs" / "x.log"
    file = _file(path, [], [0.0], max_bytes=20)
    for number in range(10):
        file.write(b"line %d..\n" % number)
    file.close()
    assert path.read_bytes() == b"line 8..\nline 9..\n"
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["x.log", "x.log.1", "x.log.2"]
    assert path.stat().st_mode & 0o077 == 0


def test_rotating_file_failure_is_told_once_and_retried(tmp_path: Path) -> None:
    """A bad disk costs lines of the file, not the service."""
    folder = tmp_path / "logs"
    folder.write_text("in the way")
    failures: list[OSError] = []
    now = [0.0]
    file = _file(folder / "x.log", failures, now, max_bytes=1000)
    file.write(b"lost\n")
    file.write(b"lost\n")
    now[0] = 11.0
    file.write(b"lost\n")
    assert [failure.errno in {errno.EEXIST, errno.ENOTDIR} for failure in failures] == [True]
    folder.unlink()
    now[0] = 22.0
    file.write(b"kept\n")
    assert (folder / "x.log").read_bytes() == b"kept\n"
    assert not file.is_failing
    file.close()


def _run_hub(tmp_path: Path, count: int) -> tuple[LogHub, list[bytes], list[bytes]]:
    followed: list[bytes] = []

    async def run() -> LogHub:
        complete = asyncio.Event()

        def follow(actor: str, line: bytes) -> None:
            followed.append(line)
            if len(followed) == count:
                complete.set()

        hub = LogHub(tmp_path, Logging(), on_failure=lambda error: pytest.fail(str(error)))
        hub.follow(follow)
        read_fd, write_fd = os.pipe()
        pipe = hub.capture("a", read_fd)
        pipe.pid = 7
        os.write(write_fd, b"\n".join(b"%d" % number for number in range(count)))
        os.close(write_fd)
        await asyncio.wait_for(complete.wait(), timeout=DEADLINE_S)
        hub.add("b", b'{"event":"last"}')
        hub.close()
        return hub

    hub = asyncio.run(run())
    return hub, followed, hub.path.read_bytes().splitlines()


def test_hub_captures_to_ring_file_and_followers(tmp_path: Path) -> None:
    """The last unfinished line of a dead child is kept, too."""
    hub, followed, on_disk = _run_hub(tmp_path, 600)
    assert followed == on_disk
    assert len(hub.lines("a", 1000)) == RING_LINES
    assert msgspec.json.decode(hub.lines("a", 1)[0])["text"] == "599"
    assert hub.lines(None, 2)[-1] == b'{"event":"last"}'
    assert hub.lines("a", 0) == []
    assert hub.lines("nobody", 5) == []


def test_json_line_with_broken_text_is_wrapped_not_raised() -> None:
    """What a dying process writes must never harm the root."""
    for line in (b'{"event":"\xff\xfe"}', b'{"a":' * 5000, b"{\x00}"):
        entry = msgspec.json.decode(json_line(line, "engine/0", 7, 0.0))
        assert entry["event"] == "output"
