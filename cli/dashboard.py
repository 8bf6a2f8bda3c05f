"""`cortexd top`: actors, models, devices and events of the running daemon, redrawn in place.

Reads the admin socket only (`status`, `host`, `events`), so it works whatever the HTTP side does.
`render` is a pure function of those three answers.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cli import format as fmt
from cli.control import Channel, Document, connected, settings_of
from cli.exit_code import OK, CommandError
from cli.models import documents
from cortexd.errors import CortexError

_MAX_EVENTS: Final = 200
_EVENT_LINES: Final = 12
_STYLES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("ok", "ready", "loaded"), "green"),
    **dict.fromkeys(("degraded", "failed", "exited"), "red"),
}
_OTHER_STYLE: Final = "yellow"
_BAD_ENDINGS: Final = (".down", ".failed", ".crashed", ".suspect", ".hung", ".exited")


def top(args: argparse.Namespace) -> int:
    """Redraw until Ctrl-C. Raises: NotRunning; CommandError without a terminal."""
    if not sys.stdout.isatty():
        raise CommandError("top needs a terminal; for scripts use: cortexd status --json")
    console = Console()
    events: deque[Document] = deque(maxlen=_MAX_EVENTS)
    with connected(settings_of(args).settings) as channel, contextlib.suppress(KeyboardInterrupt):
        first = look(channel, events)
        with Live(render(*first, events), console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(render(*look(channel, events), events), refresh=True)
                time.sleep(args.interval)
    return OK


def look(channel: Channel, events: deque[Document]) -> tuple[Document, Document]:
    """Return the `status` and `host` answers, and append what happened since the last look."""
    status = channel.request("status", {})
    try:
        host = channel.request("host", {})
    except CortexError as error:  # the poller restarts: the rest of the screen is still true
        host = {"error": error.message}
    since = events[-1].get("sequence", 0) if events else 0
    answer = channel.request("events", {"since": since})
    events.extend(documents(answer.get("events")))
    return status, host


def render(status: Document, host: Document, events: deque[Document]) -> RenderableType:
    """Return one screen."""
    return Group(
        _header(status),
        Panel(_models(status, host), title="models", title_align="left"),
        Panel(_devices(host), title="devices", title_align="left"),
        Panel(_actors(status), title="actors", title_align="left"),
        Panel(_events(events), title="events", title_align="left"),
    )


def _header(status: Document) -> Text:
    text = Text("cortexd ", style="bold")
    text.append(f"{status.get('version', '?')}  ")
    text.append_text(_state(status.get("state")))
    text.append(
        f"  role {status.get('role', '?')}  up {fmt.duration(fmt.number(status, 'uptime_s'))}"
    )
    listen = status.get("listen")
    if isinstance(listen, dict):
        text.append("  " + "  ".join(f"{name} {address}" for name, address in listen.items()))
    return text


def _models(status: Document, host: Document) -> RenderableType:
    if status.get("models_error"):
        return Text(f"unknown: {fmt.printable(str(status['models_error']))}", style="red")
    models = documents(status.get("models"))
    if not models:
        return Text("none; load one with: cortexd load ID")
    loads = {load.get("model_id"): load for load in documents(host.get("loads"))}
    table = _table(
        "model", "state", "memory>", "running>", "waiting>", "prefill>", "decode>", "KV>"
    )
    for model in models:
        load = loads.get(model.get("model_id"), {})
        blocks = fmt.number(load, "kv_blocks_total")
        table.add_row(
            fmt.printable(str(model.get("model_id"))),
            _model_state(model),
            fmt.size(fmt.number(model, "memory_bytes")) if model.get("memory_bytes") else "-",
            _count(load, "num_running"),
            _count(load, "num_waiting"),
            f"{fmt.number(load, 'tok_s_prefill'):.0f} tok/s" if load else "-",
            f"{fmt.number(load, 'tok_s_decode'):.1f} tok/s" if load else "-",
            f"{100 * fmt.number(load, 'kv_blocks_used') / blocks:.0f} %" if blocks else "-",
        )
    return table


def _model_state(model: Document) -> Text:
    text = _state(model.get("state"))
    progress = model.get("progress")
    if isinstance(progress, int | float):
        text.append(f" {model.get('stage') or ''} {100 * progress:.0f} %")
    if model.get("error"):
        text.append(f" {fmt.printable(str(model['error']))}")
    return text


def _devices(host: Document) -> RenderableType:
    if host.get("error"):
        return Text(f"unknown: {fmt.printable(str(host['error']))}", style="red")
    table = _table("device", "name", "memory used>", "of>", "busy>", "temperature>")
    for device in documents(host.get("devices")):
        busy, temperature = device.get("utilization_pct"), device.get("temperature_c")
        table.add_row(
            f"{device.get('kind')}:{device.get('index')}",
            fmt.printable(str(device.get("name"))),
            fmt.size(fmt.number(device, "memory_used_bytes")),
            fmt.size(fmt.number(device, "memory_total_bytes")),
            "-" if busy is None else f"{busy:.0f} %",
            "-" if temperature is None else f"{temperature:.0f} °C",
        )
    return table


def _actors(status: Document) -> RenderableType:
    table = _table("actor", "state", "pid>", "since>", "restarts>", "memory>", "lag>")
    for actor in documents(status.get("actors")):
        table.add_row(
            fmt.printable(str(actor.get("name"))),
            _state(actor.get("state")),
            str(actor.get("pid") or "-"),
            fmt.duration(fmt.number(actor, "since_s")),
            _count(actor, "restarts"),
            fmt.size(fmt.number(actor, "rss_bytes")) if actor.get("rss_bytes") else "-",
            f"{fmt.number(actor, 'lag_ms'):.1f} ms",
        )
    return table


def _events(events: deque[Document]) -> RenderableType:
    lines = []
    for entry in list(events)[-_EVENT_LINES:]:
        at = time.strftime("%H:%M:%S", time.localtime(fmt.number(entry, "time")))
        name = str(entry.get("event", ""))
        fields = entry.get("fields")
        shown = fields.items() if isinstance(fields, dict) else ()
        line = f"{at} {name} " + " ".join(f"{key}={value}" for key, value in shown)
        style = "red" if name.endswith(_BAD_ENDINGS) else ""
        lines.append(Text(fmt.printable(line), style=style, no_wrap=True, overflow="ellipsis"))
    return Group(*lines) if lines else Text("none yet")


def _table(*headers: str) -> Table:
    table = Table(box=None, expand=True, pad_edge=False)
    for header in headers:
        right = header.endswith(">")
        table.add_column(header.rstrip(">"), justify="right" if right else "left", no_wrap=True)
    return table


def _state(state: object) -> Text:
    name = str(state)
    return Text(name, style=_STYLES.get(name, _OTHER_STYLE))


def _count(document: Mapping[str, object], key: str) -> str:
    return str(document[key]) if key in document else "-"
