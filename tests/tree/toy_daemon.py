"""A root over toy actors: the process (`python -m tests.tree.toy_daemon`) and its handle.

The handle is itself the subreaper of what the root might orphan, so leftovers are found among its
own descendants, never by name.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Self

import msgspec
import psutil

from actors.root.process import become_subreaper
from actors.root.root import run_root
from actors.root.spec import ChildSpec
from actors.transport.admin_channel import AdminChannel
from cortexd.errors import CortexError
from cortexd.settings import Settings
from tests.waiting import DEADLINE_S, wait_for

REPOSITORY = Path(__file__).resolve().parents[2]


class ToyOrder(msgspec.Struct):
    """What the process under test is told on its command line."""

    settings: Settings
    children: list[ChildSpec]
    num_listeners: int = 0


def main() -> int:
    """Be the root."""
    order = msgspec.json.decode(sys.argv[1], type=ToyOrder)
    listeners = {}
    for index in range(order.num_listeners):
        listeners[f"l{index}"] = socket.create_server(("127.0.0.1", 0))
    try:
        return run_root(
            order.settings,
            order.children,
            listeners,
            on_ready=lambda: print("ready", flush=True),
            addresses={"api": "127.0.0.1:1"},
        )
    except CortexError as error:
        print(f"{error.code}: {error.message}", file=sys.stderr)
        return 1


class ToyDaemon:
    """One root under test; a context manager that proves nothing is left."""

    def __init__(
        self,
        children: list[ChildSpec],
        *,
        num_listeners: int = 0,
        supervision: dict[str, Any] | None = None,
    ) -> None:
        # Socket paths are limited to 107 bytes, which pytest's own directories can exceed.
        self.folder = Path(tempfile.mkdtemp(prefix="ctx-"))
        document = {
            "paths": {"runtime_dir": f"{self.folder}/run", "state_dir": f"{self.folder}/state"},
            "role": "gateway",  # no engine: its fork server would import torch in every test
            # A busy machine may stop a healthy process for longer than the default.
            "supervision": {"kill_after_s": DEADLINE_S, **(supervision or {})},
        }
        self.order = ToyOrder(msgspec.convert(document, Settings), children, num_listeners)
        self.process: subprocess.Popen[str] | None = None
        self._channel: AdminChannel | None = None

    def __enter__(self) -> Self:
        become_subreaper()
        self.start()
        assert self.process is not None
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n", self.errors()
        return self

    def start(self) -> None:
        """Start the process without waiting."""
        self._errors = (self.folder / "stderr").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.tree.toy_daemon", msgspec.json.encode(self.order)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def __exit__(self, *_: object) -> None:
        assert self.process is not None
        family = self.family()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            if self._channel is not None:
                self._channel.close()
            _, alive = psutil.wait_procs(family, timeout=DEADLINE_S)
            for process in alive:
                process.kill()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self._errors.close()
            left = [path.name for path in (self.folder / "run").glob("*.s")]
            shutil.rmtree(self.folder)
        assert not alive, f"processes outlived the root: {alive}"
        if self.process.returncode != -signal.SIGKILL:
            assert not left, f"sockets outlived the root: {left}"

    @property
    def pid(self) -> int:
        """Return the root's pid."""
        assert self.process is not None
        return self.process.pid

    def wait(self) -> int:
        """Return the root's exit code."""
        assert self.process is not None
        return self.process.wait(DEADLINE_S)

    def errors(self) -> str:
        """Return what the root wrote to its standard error."""
        return (self.folder / "stderr").read_text()

    def log(self) -> str:
        """Return the log file."""
        return (self.folder / "state/logs/cortexd.log").read_text()

    def family(self) -> list[psutil.Process]:
        """Return all descendants of the root."""
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    @property
    def channel(self) -> AdminChannel:
        """Return the admin channel."""
        if self._channel is None:
            self._channel = AdminChannel(self.folder / "run/admin.s", timeout_s=DEADLINE_S)
        return self._channel

    def admin(self, op: str, **args: object) -> Any:
        """Run one admin operation."""
        return self.channel.request(op, args)

    def command(self, do: str, **args: object) -> Any:
        """Have the toy called "router" do something."""
        return self.admin("requests", do=do, **args)

    def relay(self, to: str, do: str, deadline_s: float = DEADLINE_S, **args: object) -> Any:
        """Have the router ask another toy to do something."""
        return self.command("relay", to=to, deadline_s=deadline_s, args={"do": do, **args})

    def actor(self, name: str) -> dict[str, Any]:
        """Return one actor's status line."""
        for line in self.admin("actors")["actors"]:
            if line["name"] == name:
                found: dict[str, Any] = line
                return found
        return {"state": "absent", "pid": 0, "incarnation": 0}

    def wait_ready(self, name: str, after: int = 0) -> dict[str, Any]:
        """Return the status of the first ready incarnation later than `after`."""

        def ready() -> dict[str, Any] | None:
            actor = self.actor(name)
            is_new = actor["state"] == "ready" and actor["incarnation"] > after
            return actor if is_new else None

        found: dict[str, Any] = wait_for(ready, f"{name} getting ready")
        return found

    def wait_event(self, event: str, **fields: object) -> dict[str, Any]:
        """Return the fields of the first root event of this name and these fields."""

        def seen() -> dict[str, Any] | None:
            for one in self.admin("events")["events"]:
                if one["event"] == event and fields.items() <= one["fields"].items():
                    found: dict[str, Any] = one["fields"]
                    return found
            return None

        found: dict[str, Any] = wait_for(seen, f"event {event} {fields}")
        return found

    def seen(self, event: str) -> list[dict[str, Any]]:
        """Return the registry events of one kind that the router toy has seen."""
        return [one for one in self.command("seen") if one["event"] == event]

    def wait_seen(self, event: str, **fields: object) -> dict[str, Any]:
        """Return the first such registry event."""

        def first() -> dict[str, Any] | None:
            return next((one for one in self.seen(event) if fields.items() <= one.items()), None)

        found: dict[str, Any] = wait_for(first, f"the router seeing {event} {fields}")
        return found

    def kill(self, name: str, signum: int = signal.SIGKILL) -> int:
        """Signal an actor; return its incarnation."""
        actor = self.actor(name)
        os.kill(actor["pid"], signum)
        return int(actor["incarnation"])


def toys(*names: str, args: bytes = b"") -> list[ChildSpec]:
    """Return specs of toy actors."""
    return [ChildSpec(name, "tests.tree.toys:Toy", args=args, drain_s=0.5) for name in names]


if __name__ == "__main__":
    raise SystemExit(main())
