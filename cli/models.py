"""`cortexd models`, `load` and `unload`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from cli import format as fmt
from cli.control import Document, connected, settings_of, wait_for_operation
from cli.exit_code import OK
from cortexd.errors import ConfigError
from cortexd.model_id import absolute_model_id, check_model_id
from cortexd.paths import home_dir


def models(args: argparse.Namespace) -> int:
    """List the models of this daemon."""
    with connected(settings_of(args).settings) as channel:
        document = channel.request("models", {})
    if args.json:
        print(json.dumps(document, indent=2))
        return OK
    found = document.get("models")
    listed = (
        [model for model in found if isinstance(model, dict)] if isinstance(found, list) else []
    )
    if not listed:
        print(none_listed(document.get("nodes_down")))
        return OK
    print(models_table(listed, colour=fmt.has_colour(sys.stdout)))
    aliases = document.get("aliases")
    if isinstance(aliases, dict) and aliases:
        print("\n" + fmt.table(["ALIAS", "MODEL"], [[a, str(t)] for a, t in aliases.items()]))
    return OK


def none_listed(nodes_down: object) -> str:
    """Return what to do where there is no model, given the names of nodes that do not answer."""
    if isinstance(nodes_down, list) and nodes_down:
        names = ", ".join(fmt.printable(str(name)) for name in nodes_down)
        return f"no models; these neurons do not answer: {names}; see: cortexd status"
    return "no models; load one with: cortexd load ID"


def load(args: argparse.Namespace) -> int:
    """Load a model; return when it serves. Raises: what the load failed with."""
    model_id = given_model_id(args.model_id)
    if args.devices is not None and len(args.devices) != args.tp:
        raise ConfigError(
            f"--devices names {len(args.devices)} devices and --tp is {args.tp}; "
            "allowed: exactly one device for each rank"
        )
    options: Document = {"model_id": model_id, "tensor_parallel": args.tp}
    if args.quant is not None:
        options["quant"] = args.quant
    if args.devices is not None:
        options["devices"] = args.devices
    shown = ""

    def on_progress(progress: Document) -> None:
        nonlocal shown
        text = progress_text(progress)
        if text != shown:
            shown = text
            print(f"{model_id}: {text}", file=sys.stderr, flush=True)

    started = time.monotonic()
    with connected(settings_of(args).settings) as channel:
        accepted = channel.request("model.load", options)
        model = wait_for_operation(channel, accepted, on_progress)
    print(f"loaded {model_id} in {time.monotonic() - started:.1f} s{_where(model)}")
    return OK


def unload(args: argparse.Namespace) -> int:
    """Unload a model; return when its memory is free. Raises: what the unload failed with."""
    model_id = given_model_id(args.model_id)
    with connected(settings_of(args).settings) as channel:
        accepted = channel.request("model.unload", {"model_id": model_id})
        wait_for_operation(channel, accepted, lambda progress: None)
    print(f"unloaded {model_id}")
    return OK


def given_model_id(model_id: str) -> str:
    """Return the id as the daemon knows it: local paths are absolute. Raises: ConfigError.

    An alias has the form of an id or of a plain word, so a word without a slash passes too.
    """
    if "/" in model_id or ":" in model_id or not model_id:
        check_model_id(model_id)
    return absolute_model_id(model_id, Path(os.getcwd()), home_dir())


def documents(value: object) -> list[Document]:
    """Return the JSON objects of what should be an array of them."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def models_table(models: list[Document], *, colour: bool) -> str:
    """Return one line for each model."""
    headers = ["MODEL", "STATE", ">MEMORY", ">CONTEXT", ">IN FLIGHT", ">LAST USED", "DETAIL"]
    rows = []
    for model in models:
        limits = model.get("limits")
        context = limits.get("context") if isinstance(limits, dict) else None
        last_used_s = model.get("last_used_s")
        memory = model.get("memory_bytes")
        rows.append(
            [
                fmt.printable(str(model.get("model_id"))),
                fmt.state(str(model.get("state")), colour=colour),
                fmt.size(memory) if isinstance(memory, int) and memory else "-",
                str(context) if context else "-",
                str(model.get("in_flight", 0)),
                f"{fmt.duration(last_used_s)} ago" if isinstance(last_used_s, int | float) else "-",
                fmt.printable(_detail(model)),
            ]
        )
    return fmt.table(headers, rows)


def _where(model: Mapping[str, object]) -> str:
    """Return ` on cpu (tp 2)`; empty for a model of another node, which tells nothing of itself."""
    device = model.get("device")
    if not device:
        return ""
    placing = _placing(model)
    return f" on {fmt.printable(str(device))}" + (f" ({', '.join(placing)})" if placing else "")


def _placing(model: Mapping[str, object]) -> list[str]:
    ranks, devices = model.get("tensor_parallel"), model.get("devices")
    found = [f"tp {ranks}"] if isinstance(ranks, int) and ranks > 1 else []
    if isinstance(devices, list) and devices:
        found.append("devices " + ",".join(str(device) for device in devices))
    return found


def _detail(model: Mapping[str, object]) -> str:
    node = f"on {model['node']}" if model.get("node") else ""
    if model.get("error"):
        return ": ".join(filter(None, (node, str(model["error"]))))
    if model.get("state") in ("loading", "recovering"):
        return " ".join(filter(None, (node, progress_text(model))))
    details = [node] if node else []
    details += [str(model["quant"])] if model.get("quant") else []
    return ", ".join(details + _placing(model))


def progress_text(progress: Mapping[str, object]) -> str:
    """Return how far a load or a download is: `downloading 42 %, 17s left`."""
    text = str(progress.get("stage") or "waiting")
    done, total = progress.get("done_bytes"), progress.get("total_bytes")
    fraction = progress.get("progress", progress.get("fraction"))
    if isinstance(done, int) and isinstance(total, int) and total > 0:
        text += f" {100 * done // total} % of {fmt.size(total)}"
    elif isinstance(done, int) and done > 0:
        text += f" {fmt.size(done)}"
    elif isinstance(fraction, int | float):
        text += f" {100 * fraction:.0f} %"
    eta_s = progress.get("eta_s")
    return text + (f", {fmt.duration(eta_s)} left" if isinstance(eta_s, int | float) else "")
