"""Starts what the gateway benchmark compares; every target relays to the same mock upstream."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from actors.transport.admin_channel import AdminChannel
from bench.gateway.mock import MODEL
from bench.servers import free_port, wait_until

_START_TIMEOUT_S: Final = 120.0
_STOP_TIMEOUT_S: Final = 30.0
_ADMIN_TIMEOUT_S: Final = 10.0
_NGINX: Final = """
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  upstream mock {{ server 127.0.0.1:{upstream}; keepalive 256; }}
  server {{
    listen 127.0.0.1:{port} backlog=2048;
    location / {{
      proxy_pass http://mock; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""
_CORTEXD: Final = """
role = "gateway"
[gateway]
listen = "127.0.0.1:{port}"
metrics_listen = "127.0.0.1:{metrics_port}"
fronts = {fronts}
[paths]
runtime_dir = "{folder}/run"
state_dir = "{folder}/state"
[[neurons]]
name = "mock"
endpoint = "http://127.0.0.1:{upstream}"
kind = "openai"
"""
_LITELLM: Final = """
model_list:
  - model_name: {model}
    litellm_params:
      model: openai/{model}
      api_base: http://127.0.0.1:{upstream}/v1
      api_key: none
litellm_settings:
  num_retries: 0
general_settings:
  dangerously_permit_weak_or_unset_master_key: true
"""


@dataclass(slots=True, frozen=True)
class Target:
    """Something that answers `/v1/chat/completions` on a port of this machine."""

    name: str
    port: int
    pid: int
    speaks_anthropic: bool = False


@dataclass(slots=True, frozen=True, kw_only=True)
class Gateway(Target):
    """One of ours, which tells more about itself."""

    metrics_port: int
    runtime_dir: Path

    def request(self, operation: str) -> dict[str, Any]:
        """Run one operation of the admin socket."""
        with AdminChannel(self.runtime_dir / "admin.s", timeout_s=_ADMIN_TIMEOUT_S) as channel:
            return channel.request(operation)

    def pids(self) -> dict[str, int]:
        """Return the pid of every actor, by name, and of the root."""
        actors = self.request("status")["actors"]
        return {"root": self.pid, **{actor["name"]: actor["pid"] for actor in actors}}


@contextmanager
def mock(interval_s: float) -> Iterator[Target]:
    """Run the upstream itself: the target "direct"."""
    port = free_port()
    command = [sys.executable, "-m", "bench.gateway.mock", str(port), str(interval_s)]
    with running(command, port) as pid:
        yield Target("direct", port, pid)


@contextmanager
def nginx(folder: Path, upstream: int) -> Iterator[Target]:
    """Run nginx with buffering off and a keep-alive pool. Raises: FileNotFoundError without it."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/sbin")
    if program is None:
        raise FileNotFoundError("nginx is not installed: apt-get install nginx-light")
    port = free_port()
    folder.mkdir()
    config = folder / "nginx.conf"
    config.write_text(_NGINX.format(folder=folder, upstream=upstream, port=port))
    command = [program, "-e", str(folder / "error.log"), "-p", str(folder), "-c", str(config)]
    with running(command, port) as pid:
        yield Target("nginx", port, pid)


@contextmanager
def cortexd(folder: Path, upstream: int, fronts: int) -> Iterator[Gateway]:
    """Run our gateway with the mock as an external server."""
    gateway = prepared(folder, upstream, fronts)
    with running(gateway.command, gateway.port) as pid:
        name = f"cortexd, {fronts} front" + ("s" if fronts > 1 else "")
        yield Gateway(
            name,
            gateway.port,
            pid,
            speaks_anthropic=True,
            metrics_port=gateway.metrics_port,
            runtime_dir=folder / "run",
        )


@dataclass(slots=True, frozen=True)
class Prepared:
    """A gateway that can be started."""

    port: int
    metrics_port: int
    command: list[str]


def prepared(folder: Path, upstream: int, fronts: int) -> Prepared:
    """Write the configuration of a gateway in front of the mock."""
    port, metrics_port = free_port(), free_port()
    folder.mkdir()
    config = folder / "cortex.toml"
    text = _CORTEXD.format(
        folder=folder, upstream=upstream, port=port, metrics_port=metrics_port, fronts=fronts
    )
    config.write_text(text)
    command = [sys.executable, "-m", "cortexd", "start", "--config", str(config)]
    return Prepared(port, metrics_port, command)


@contextmanager
def litellm(folder: Path, upstream: int, venv: Path) -> Iterator[Target]:
    """Run the LiteLLM proxy from an environment of its own, made at the first use."""
    program = venv / "bin" / "litellm"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "-q", "litellm[proxy]"]
        subprocess.run(pip, check=True)
    port = free_port()
    folder.mkdir()
    config = folder / "litellm.yaml"
    config.write_text(_LITELLM.format(model=MODEL, upstream=upstream))
    command = [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    with running(command, port, ready_path="/health/liveliness") as pid:
        # Its /v1/messages asks the upstream for OpenAI's Responses API, which the mock has not.
        yield Target("LiteLLM", port, pid)


@contextmanager
def running(command: list[str], port: int, ready_path: str = "/v1/models") -> Iterator[int]:
    """Run a server, from when it answers until the block ends. Yields its pid."""
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "0"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)

    def is_ready() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"{command[0]} ended with {process.returncode}")
        return _answers(f"http://127.0.0.1:{port}{ready_path}")

    try:
        wait_until(is_ready, command[0], timeout_s=_START_TIMEOUT_S, period_s=0.1)
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    """Return whether a GET is answered with 200, and names the model where it lists models."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            body: bytes = response.read()
    except (urllib.error.URLError, OSError):
        return False
    return not url.endswith("/v1/models") or MODEL.encode() in body
