"""`cortexd start`: settings from file, environment and command line, then the root supervisor."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from cli.config import catalogue_warnings
from cli.format import complain
from cli.model_watch import watch_models
from cortexd import __version__
from cortexd.address import parse_host_port
from cortexd.config import LoadedSettings, load_settings
from cortexd.config_env import Override
from cortexd.demo import DEMO_ALIAS, DEMO_MODEL
from cortexd.errors import ConfigError
from cortexd.settings import Settings


def start(args: argparse.Namespace) -> int:
    """Run the daemon until it is stopped; return its exit code. Raises: ConfigError."""
    loaded = load_start_settings(args, os.environ, Path.cwd())
    for warning in (*loaded.warnings, *catalogue_warnings(loaded)):
        complain(f"warning: {warning}")
    from actors.node import run

    return run(loaded.settings, on_ready=_announce(loaded.settings, demo=args.demo))


def load_start_settings(
    args: argparse.Namespace, environ: Mapping[str, str], cwd: Path
) -> LoadedSettings:
    """Load the settings with the options of the command line on top. Raises: ConfigError."""
    overrides: list[Override] = []
    if args.role:
        overrides.append(Override(("role",), args.role, "--role"))
    if args.listen:
        role = load_settings(args.config, environ, cwd, overrides).settings.role
        section = "neuron" if role == "neuron" else "gateway"
        overrides.append(Override((section, "listen"), args.listen, "--listen"))
    models = [{"model_id": DEMO_MODEL}] if args.demo else []
    quant = {"quant": args.quant} if args.quant is not None else {}
    models += [{"model_id": model_id, **quant} for model_id in args.model]
    if args.quant is not None and not args.model:
        raise ConfigError("--quant says how to load a --model; give one")
    if models:
        origin = "--demo" if args.demo and not args.model else "--model"
        overrides.append(Override(("default_models",), models, origin))
    return load_settings(args.config, environ, cwd, overrides)


def _announce(settings: Settings, *, demo: bool) -> Callable[[Mapping[str, str]], None]:
    """Return what is called, once, when the daemon serves."""

    def on_ready(addresses: Mapping[str, str]) -> None:
        print(ready_block(addresses, demo=demo), flush=True)
        if settings.default_models:
            watch_models(settings)

    return on_ready


def ready_block(addresses: Mapping[str, str], *, demo: bool) -> str:
    """Return what a user needs to know first: where it listens, and with `demo` a line to try.

    `addresses`: "api", "metrics", "neuron" → the bound host:port, as far as they are served.
    """
    urls = {name: parse_host_port(address).url() for name, address in addresses.items()}
    lines = [f"cortexd {__version__} ready"]
    if "api" in urls:
        lines.append(f"  API      {urls['api']}/v1")
    if "metrics" in urls:
        lines.append(f"  metrics  {urls['metrics']}/metrics")
    if "neuron" in urls:
        lines.append(f"  neuron   {urls['neuron']}")
    if demo and "api" in urls:
        lines += ["try it:", f"  {demo_curl(urls['api'])}"]
    lines.append("Ctrl-C stops it; see also: cortexd status, cortexd chat, cortexd logs")
    return "\n".join(lines)


def demo_curl(api_url: str) -> str:
    """Return a shell line that asks the demo model a question."""
    body = {
        "model": DEMO_ALIAS,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
    }
    return (
        f"curl {api_url}/v1/chat/completions -H 'Content-Type: application/json' "
        f"-d '{json.dumps(body)}'"
    )
