"""Starts a real `cortexd` in its own directories and free ports, and proves that it leaves nothing.

The test process is made the reaper of what the daemon might orphan, so a leftover process is found
by walking our own descendants, never by name.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from actors.transport.admin_channel import AdminChannel
from tests.tree.ports import free_port
from tests.waiting import DEADLINE_S, wait_for


class Daemon:
    """One daemon under test; use as a context manager."""

    host = "127.0.0.1"
    command_prefix: tuple[str, ...] = ()  # what starts it elsewhere than here

    def __init__(self, root: Path, *arguments: str, **environment: str) -> None:
        self.root = root
        self.api_port, self.metrics_port, self.neuron_port = (free_port() for _ in range(3))
        # ipc paths are limited to 107 bytes, and pytest's directories are long.
        self.runtime_dir = Path(f"/tmp/cx-{os.getpid()}-{self.api_port}")
        self.arguments = arguments
        self.environment = {
            **os.environ,
            "CORTEXD_GATEWAY__LISTEN": f"127.0.0.1:{self.api_port}",
            "CORTEXD_GATEWAY__METRICS_LISTEN": f"127.0.0.1:{self.metrics_port}",
            "CORTEXD_NEURON__LISTEN": f"127.0.0.1:{self.neuron_port}",
            "CORTEXD_PATHS__RUNTIME_DIR": str(self.runtime_dir),
            "CORTEXD_PATHS__STATE_DIR": str(root / "state"),
            "CORTEXD_ENGINE__NUM_THREADS": "1",
            # A busy machine may stop a healthy process for longer than the default; the tests of
            # hangs set their own.
            "CORTEXD_SUPERVISION__KILL_AFTER_S": str(DEADLINE_S),
            "HF_HUB_OFFLINE": "1",
            **environment,
        }
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        self.wait_ready()
        return self

    def start(self) -> None:
        """Start and wait until the front answers."""
        self.output = self.root / "output.txt"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*self.command_prefix, sys.executable, "-m", "cortexd", "start", *self.arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                env=self.environment,
                cwd=Path(__file__).resolve().parents[2],
            )
        wait_for(self._front_answers, "the front's first answer")

    def wait_ready(self) -> None:
        """Wait until every actor has been ready once: the front may answer before the others."""
        wait_for(lambda: self.admin("status")["state"] != "starting", "all actors getting ready")

    def _front_answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the daemon ended:\n{self.output.read_text()}")
        try:
            return self.get("/livez")[0] == 200
        except OSError:
            return False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        leftovers = self.stop()
        if error is None:
            assert not leftovers, f"processes outlived the daemon: {leftovers}"
        else:
            sys.stderr.write(self.log()[-8000:])

    def stop(self, signal_number: int = signal.SIGTERM) -> list[str]:
        """Stop, wait, and return the processes that outlived it."""
        assert self.process is not None
        family = self.family()
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
            try:
                self.process.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        _, alive = psutil.wait_procs(family, timeout=DEADLINE_S)
        for process in alive:
            process.kill()
        return [str(process) for process in alive]

    def family(self) -> list[psutil.Process]:
        """Return the root's descendants, fork servers included."""
        assert self.process is not None
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def log(self) -> str:
        """Return the daemon's output and log files."""
        texts = [self.output.read_text()]
        texts += [path.read_text() for path in sorted((self.root / "state").rglob("*.log*"))]
        return "\n".join(texts)

    # The admin socket

    def admin(self, op: str, **arguments: object) -> Any:
        """Run one admin operation."""
        with AdminChannel(self.runtime_dir / "admin.s", timeout_s=DEADLINE_S) as channel:
            return channel.request(op, arguments)

    def actors(self) -> dict[str, dict[str, Any]]:
        """Return name → status of every actor."""
        return {actor["name"]: actor for actor in self.admin("status")["actors"]}

    def router_status(self) -> dict[str, Any]:
        """Return the status with the router's part, once it answers in time for it."""

        def with_models() -> dict[str, Any] | None:
            status: dict[str, Any] = self.admin("status")
            return None if status["models"] is None else status

        status = wait_for(with_models, "the router's answer")
        assert status is not None
        return status

    def nodes(self) -> dict[str, dict[str, Any]]:
        """Return name → how the gateway sees each node."""
        return {node["name"]: dict(node) for node in self.router_status()["nodes"]}

    def has_healthy(self, name: str) -> bool:
        """Tell whether the gateway has heard from a node, and takes it for healthy."""
        return bool(self.nodes().get(name, {}).get("is_healthy"))

    def models(self) -> dict[str, dict[str, Any]]:
        """Return model id → status."""
        return {model["model_id"]: model for model in self.router_status()["models"]}

    def wait_loaded(self, model_id: str) -> None:
        """Wait until a model serves."""

        def loaded() -> bool:
            model = self.models().get(model_id, {})
            assert model.get("state") != "failed", model
            return model.get("state") == "loaded"

        wait_for(loaded, f"loading {model_id}")

    @contextmanager
    def paused(self, actor: str) -> Iterator[None]:
        """Stop an actor's process for the time of the block: what waits for it cannot end."""
        pid = int(self.actors()[actor]["pid"])
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def leader(self, model_id: str) -> str:
        """Return the name of a loaded model's first rank."""
        return str(self.models()[model_id]["leader"])

    def kill(self, actor: str) -> int:
        """SIGKILL an actor; return the pid it had."""
        pid = int(self.actors()[actor]["pid"])
        os.kill(pid, signal.SIGKILL)
        return pid

    def wait_back(self, actor: str, pid: int) -> None:
        """Wait until an actor is ready in another process than this."""

        def is_back() -> bool:
            seen = self.actors()[actor]
            return seen["state"] == "ready" and seen["pid"] != pid

        wait_for(is_back, f"{actor} coming back")

    # HTTP

    def url(self, path: str = "") -> str:
        """Return a URL of the API listener."""
        return f"http://127.0.0.1:{self.api_port}{path}"

    def get(self, path: str, *, port: int | None = None) -> tuple[int, str]:
        """GET a path; return status and body."""
        return self._open(urllib.request.Request(self._at(port, path)))

    def post(self, path: str, body: object, *, port: int | None = None) -> tuple[int, Any]:
        """POST JSON; return status and decoded body."""
        request = urllib.request.Request(
            self._at(port, path),
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        status, text = self._open(request)
        return status, json.loads(text)

    def chat(self, model: str, text: str, **fields: object) -> tuple[int, Any]:
        """Ask one greedy chat question."""
        return self.post("/v1/chat/completions", _chat_body(model, text, fields))

    def stream(self, model: str, text: str, **fields: object) -> Iterator[dict[str, Any] | str]:
        """Yield the data events of a streamed chat answer ("[DONE]" as a string)."""
        request = urllib.request.Request(
            self.url("/v1/chat/completions"),
            data=json.dumps({**_chat_body(model, text, fields), "stream": True}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
            for line in response:
                if line.startswith(b"data: "):
                    data = line[6:].strip().decode()
                    yield data if data == "[DONE]" else json.loads(data)

    def _at(self, port: int | None, path: str) -> str:
        return f"http://{self.host}:{port or self.api_port}{path}"

    @staticmethod
    def _open(request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


class NeuronDaemon(Daemon):
    """A neuron-only daemon: it answers on its neuron listener."""

    def _front_answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.output.read_text()
        try:
            return self.get("/livez", port=self.neuron_port)[0] == 200
        except OSError:
            return False


def _chat_body(model: str, text: str, fields: dict[str, object]) -> dict[str, object]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 16,
        **fields,
    }


def streamed_text(events: list[dict[str, Any] | str]) -> str:
    """Return the text of a streamed answer."""
    return "".join(
        choice["delta"].get("content") or ""
        for event in events
        if isinstance(event, dict)
        for choice in event.get("choices", [])
    )
