"""`cortexd logs`: what the actors wrote, read from the daemon's rings."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping

from cli import format as fmt
from cli.control import Document, connected, settings_of
from cli.exit_code import OK
from cortexd.errors import NotRunning
from cortexd.paths import state_dir
from cortexd.settings import Settings


def logs(args: argparse.Namespace) -> int:
    """Print the last lines of one actor or of all, and with --follow each new one.

    Raises: NotRunning, which names the folder of the log files.
    """
    options: Document = {"lines": args.lines, "follow": args.follow}
    if args.actor:
        options["name"] = args.actor
    settings = settings_of(args).settings
    try:
        return _show(settings, options, follows=args.follow)
    except NotRunning as error:
        folder = state_dir(settings) / "logs"
        raise NotRunning(f"{error.message}; what was written before: {folder}") from None


def _show(settings: Settings, options: Document, *, follows: bool) -> int:
    with connected(settings) as channel:
        result = channel.request("actor.logs", options)
        lines = result.get("lines")
        for line in lines if isinstance(lines, list) else []:
            print(log_line(line))
        if follows:
            for event in channel.events():
                if event.get("event") == "end":  # the daemon stops
                    break
                print(log_line(event.get("data")), flush=True)
    return OK


def log_line(line: object) -> str:
    """Return one captured line for people: time, actor, event and its fields."""
    if not isinstance(line, dict):
        return fmt.printable(str(line))
    document = _inner(line)
    time = str(document.pop("time", ""))[11:23]
    actor = str(document.pop("actor", line.get("actor", "")))
    level = str(document.pop("level", ""))
    event = str(document.pop("event", ""))
    # What has no value, such as the error of a request that went well, would only hide the rest.
    said = {key: value for key, value in document.items() if value is not None}
    fields = " ".join(f"{key}={_value(value)}" for key, value in said.items())
    parts = (time, actor, level if level != "info" else "", event, fields)
    return fmt.printable(" ".join(part for part in parts if part))


def _inner(line: Mapping[str, object]) -> Document:
    """Return the actor's own JSON line when it wrote one, else its text as the event."""
    text = line.get("line", line.get("text"))
    if not isinstance(text, str):
        return dict(line)
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    return document if isinstance(document, dict) else {**line_head(line), "event": text}


def line_head(line: Mapping[str, object]) -> Document:
    """Return what the capture itself knows of a line: when and whose."""
    return {key: line[key] for key in ("time", "actor") if key in line}


def _value(value: object) -> str:
    if isinstance(value, str):
        return value if value and " " not in value and "\n" not in value else json.dumps(value)
    return json.dumps(value)
