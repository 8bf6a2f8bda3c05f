"""`cortexd top`: actors, models, devices and events of the running daemon, redrawn in place.

Reads the admin socket only (`status`, `host`, `events`), so it works whatever the HTTP side does.
`render` is a pure function of those three answers and the terminal's height: where that is small,
actors that are well give way to the events.
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
from cli.keypress import quit_key
from cli.models import documents, none_listed
from cortexd.errors import CortexError

_MAX_EVENTS: Final = 200
_EVENT_LINES: Final = 12
_MIN_EVENT_LINES: Final = 3
_MIN_ACTORS: Final = 3
_BORDERS: Final = 2
_STYLES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("ok", "ready", "loaded"), "green"),
    **dict.fromkeys(("degraded", "impaired", "failed", "exited"), "red"),
}
_OTHER_STYLE: Final = "yellow"
_BAD_ENDINGS: Final = (".down", ".failed", ".crashed", ".suspect", ".hung", ".exited")


def top(args: argparse.Namespace) -> int:
    """Redraw until q or Ctrl-C. Raises: NotRunning; CommandError without a terminal."""
    if not sys.stdout.isatty():
        raise CommandError("top needs a terminal; for scripts use: cortexd status --json")
    console = Console()
    events: deque[Document] = deque(maxlen=_MAX_EVENTS)
    with connected(settings_of(args).settings) as channel, contextlib.suppress(KeyboardInterrupt):
        first = look(channel, events)  # what fails here is told on the screen that was there
        with (
            Live(console=console, screen=True, auto_refresh=False) as live,
            quit_key() as is_over,
        ):
            live.update(render(*first, events, height=console.height), refresh=True)
            while not is_over(args.interval):
                seen = look(channel, events)
                live.update(render(*seen, events, height=console.height), refresh=True)
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


def render(
    status: Document, host: Document, events: deque[Document], *, height: int
) -> RenderableType:
    """Return one screen of so many lines."""
    models, devices = _models(status, host), _devices(host)
    left = height - 1 - _num_lines(models) - _num_lines(devices) - 4 * _BORDERS
    actors = _actors(status, max(left - 1 - _MIN_EVENT_LINES, _MIN_ACTORS))
    left -= _num_lines(actors)
    num_events = min(max(left, _MIN_EVENT_LINES), _EVENT_LINES)
    return Group(
        _header(status),
        Panel(models, title="models", title_align="left"),
        Panel(devices, title="devices", title_align="left"),
        Panel(actors, title="actors", title_align="left"),
        Panel(
            _events(events, num_events),
            title="events",
            title_align="left",
            subtitle="q quits",
            subtitle_align="right",
        ),
    )


def _num_lines(part: RenderableType) -> int:
    """Return how high the inside of a panel is."""
    if isinstance(part, Group):
        return sum(map(_num_lines, part.renderables))
    return part.row_count + 1 if isinstance(part, Table) else 1


def _header(status: Document) -> Text:
    text = Text("cortexd ", style="bold", no_wrap=True, overflow="ellipsis")
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
    nodes = documents(status.get("nodes"))
    models = documents(status.get("models")) + _at_nodes(nodes)
    if not models:
        return Text(none_listed([node.get("name") for node in nodes if not node.get("is_healthy")]))
    loads = {load.get("model_id"): load for load in documents(host.get("loads"))}
    table = _table(
        "model", "state", "memory>", "running>", "waiting>", "prefill>", "decode>", "KV>"
    )
    for model in models:
        load = model if model.get("node") else loads.get(model.get("model_id"), {})
        blocks = fmt.number(load, "kv_blocks_total")
        table.add_row(
            _cut(_named(model)),
            _model_state(model),
            fmt.size(fmt.number(model, "memory_bytes")) if model.get("memory_bytes") else "-",
            _count(load, "num_running"),
            _count(load, "num_waiting"),
            _speed(load.get("tok_s_prefill"), 0),
            _speed(load.get("tok_s_decode"), 1),
            f"{100 * fmt.number(load, 'kv_blocks_used') / blocks:.0f} %" if blocks else "-",
        )
    # Below the table: in it an error, which is long, would leave the other columns no room.
    errors = [
        _cut(f"{_named(model)}: {model['error']}", "red") for model in models if model.get("error")
    ]
    return Group(table, *errors)


def _at_nodes(nodes: list[Document]) -> list[Document]:
    """Return the models of the remote neurons that answer, each with what its node says of it."""
    return [
        {
            **model,
            "node": node.get("name"),
            "memory_bytes": int(fmt.number(model, "memory_mib")) << 20,
            "num_running": model.get("in_flight"),
            "num_waiting": model.get("queue_depth"),
            "error" if model.get("state") == "failed" else "stage": model.get("detail"),
        }
        for node in nodes
        if node.get("is_healthy")
        for model in documents(node.get("models"))
    ]


def _named(model: Document) -> str:
    return f"{model.get('model_id')}" + (f" on {model['node']}" if model.get("node") else "")


def _model_state(model: Document) -> Text:
    text = _state(model.get("state"))
    progress = model.get("progress")
    if isinstance(progress, int | float):
        text.append(f" {model.get('stage') or ''} {100 * progress:.0f} %")
    return text


def _devices(host: Document) -> RenderableType:
    if host.get("error"):
        return Text(f"unknown: {fmt.printable(str(host['error']))}", style="red")
    table = _table("device", "name", "memory used>", "of>", "busy>", "temperature>")
    for device in documents(host.get("devices")):
        busy, temperature = device.get("utilization_pct"), device.get("temperature_c")
        table.add_row(
            f"{device.get('kind')}:{device.get('index')}",
            _cut(str(device.get("name"))),
            fmt.size(fmt.number(device, "memory_used_bytes")),
            fmt.size(fmt.number(device, "memory_total_bytes")),
            "-" if busy is None else f"{busy:.0f} %",
            "-" if temperature is None else f"{temperature:.0f} °C",
        )
    return table


def _actors(status: Document, most: int) -> RenderableType:
    """Return a line for each actor, or for as many as fit, those that are not well first."""
    actors = documents(status.get("actors"))
    num_left_out = 0
    if len(actors) > most:
        actors.sort(key=lambda actor: actor.get("state") == "ready")
        num_left_out = len(actors) - (most - 1)
        del actors[most - 1 :]
    table = _table("actor", "state", "pid>", "since>", "restarts>", "memory>", "lag>")
    for actor in actors:
        table.add_row(
            _cut(str(actor.get("name"))),
            _state(actor.get("state")),
            str(actor.get("pid") or "-"),
            fmt.duration(fmt.number(actor, "since_s")),
            _count(actor, "restarts"),
            fmt.size(fmt.number(actor, "rss_bytes")) if actor.get("rss_bytes") else "-",
            f"{fmt.number(actor, 'lag_ms'):.1f} ms",
        )
    if num_left_out:
        return Group(table, Text(f"and {num_left_out} more; see: cortexd status", style="dim"))
    return table


def _events(events: deque[Document], most: int) -> RenderableType:
    lines = []
    for entry in list(events)[-most:]:
        at = time.strftime("%H:%M:%S", time.localtime(fmt.number(entry, "time")))
        name = str(entry.get("event", ""))
        fields = entry.get("fields")
        shown = fields.items() if isinstance(fields, dict) else ()
        line = f"{at} {name} " + " ".join(f"{key}={value}" for key, value in shown)
        lines.append(_cut(line, "red" if name.endswith(_BAD_ENDINGS) else ""))
    return Group(*lines) if lines else Text("none yet")


def _table(*headers: str) -> Table:
    """Return an empty table; numbers (">") keep their width, what else there is gives way."""
    table = Table(box=None, expand=True, pad_edge=False)
    for header in headers:
        right = header.endswith(">")
        table.add_column(header.rstrip(">"), justify="right" if right else "left", no_wrap=right)
    return table


def _cut(text: str, style: str = "") -> Text:
    """Return foreign text in one line, cut where there is no room for all of it."""
    return Text(fmt.printable(text), style=style, no_wrap=True, overflow="ellipsis")


def _state(state: object) -> Text:
    name = str(state)
    return _cut(name, _STYLES.get(name, _OTHER_STYLE))


def _speed(value: object, digits: int) -> str:
    return f"{value:.{digits}f} tok/s" if isinstance(value, int | float) else "-"


def _count(document: Mapping[str, object], key: str) -> str:
    return str(document[key]) if key in document else "-"
