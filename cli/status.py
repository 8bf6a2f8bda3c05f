"""`cortexd status`: actors and models on one screen; the exit code tells health."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping

from cli import format as fmt
from cli.control import Document, connected, settings_of
from cli.exit_code import NOT_OK, OK
from cli.models import documents, models_table
from cortexd.address import parse_host_port
from cortexd.errors import ConfigError


def status(args: argparse.Namespace) -> int:
    """Show the daemon's state. Raises: NotRunning."""
    with connected(settings_of(args).settings) as channel:
        document = channel.request("status", {})
    if args.json:
        print(json.dumps(document, indent=2))
    else:
        print(render(document, colour=fmt.has_colour(sys.stdout)))
    return OK if document.get("state") == "ok" else NOT_OK


def render(document: Document, *, colour: bool) -> str:
    """Return the status document as a screen of text."""
    health = fmt.state(_text(document, "state"), colour=colour)
    parts = [
        f"{fmt.coloured('cortexd', 'bold', enabled=colour)} {_text(document, 'version')}",
        health,
        f"role {_text(document, 'role')}",
        f"up {fmt.duration(fmt.number(document, 'uptime_s'))}",
        f"pid {_text(document, 'pid')}",
    ]
    lines = ["  ".join(parts)]
    listen = document.get("listen")
    if isinstance(listen, dict):
        lines += [f"  {name:<8} {_url(address)}" for name, address in listen.items() if address]
    lines += ["", actors_table(documents(document.get("actors")), colour=colour)]
    models = documents(document.get("models"))
    if document.get("models_error"):
        lines += ["", f"models: unknown ({fmt.printable(str(document['models_error']))})"]
    elif models:
        lines += ["", models_table(models, colour=colour)]
    elif document.get("role") != "gateway":
        lines += ["", "no models; load one with: cortexd load ID"]
    nodes = documents(document.get("nodes"))
    if nodes:
        lines += ["", nodes_table(nodes, colour=colour)]
    return "\n".join(lines)


def actors_table(actors: list[Document], *, colour: bool) -> str:
    """Return one line for each actor; the reason is shown of those that are not ready."""
    headers = ["ACTOR", "STATE", ">PID", ">SINCE", ">RESTARTS", ">MEMORY", ">LAG", "REASON"]
    rows = []
    for actor in actors:
        ready = actor.get("state") == "ready"
        rows.append(
            [
                fmt.printable(_text(actor, "name")),
                fmt.state(_text(actor, "state"), colour=colour),
                _text(actor, "pid") if actor.get("pid") else "-",
                fmt.duration(fmt.number(actor, "since_s")),
                _text(actor, "restarts"),
                fmt.size(fmt.number(actor, "rss_bytes")) if actor.get("rss_bytes") else "-",
                f"{fmt.number(actor, 'lag_ms'):.1f} ms" if ready else "-",
                "" if ready else fmt.printable(_text(actor, "reason")),
            ]
        )
    return fmt.table(headers, rows)


def nodes_table(nodes: list[Document], *, colour: bool) -> str:
    """Return one line for each remote neuron."""
    headers = ["NEURON", "KIND", "STATE", "ENDPOINT", ">LOADED", ">MODELS", ">RUNNING", "ERROR"]
    rows = []
    for node in nodes:
        models = documents(node.get("models"))
        state = "draining" if node.get("is_draining") else "ready"
        state = state if node.get("is_healthy") else "down"
        rows.append(
            [
                fmt.printable(_text(node, "name")),
                _text(node, "kind"),
                fmt.state(state, colour=colour),
                fmt.printable(_text(node, "endpoint")),
                str(sum(model.get("state") == "loaded" for model in models)),
                str(len(models)),
                _text(node, "dispatched"),
                fmt.printable(str(node.get("error") or "")),
            ]
        )
    return fmt.table(headers, rows)


def _url(address: object) -> str:
    try:
        return parse_host_port(str(address)).url()
    except ConfigError:  # the daemon's own words are still better than none
        return fmt.printable(str(address))


def _text(document: Mapping[str, object], key: str) -> str:
    return str(document.get(key, "?"))
