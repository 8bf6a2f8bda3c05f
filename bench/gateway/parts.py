"""Runs the parts of the gateway benchmark that were asked for, then shows the goals."""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from bench.gateway.cancel import measure_cancel
from bench.gateway.cold import measure_cold
from bench.gateway.goals import goals_table
from bench.gateway.rounds import measure_relay
from bench.gateway.scaling import measure_scaling
from bench.gateway.scrape_time import measure_scrape
from bench.gateway.soak import measure_soak
from bench.gateway.stall import measure_stall
from bench.gateway.start import measure_start
from bench.machine import commit, cpu_name

PARTS: Final[dict[str, Callable[[argparse.Namespace, Path], dict[str, float]]]] = {
    "relay": measure_relay,
    "start": measure_start,
    "stall": measure_stall,
    "cancel": measure_cancel,
    "cold": measure_cold,
    "scaling": measure_scaling,
    "scrape": measure_scrape,
    "soak": measure_soak,
}
_BY_DEFAULT: Final = tuple(name for name in PARTS if name != "soak")


def run(arguments: Sequence[str]) -> int:
    """Run the parts; return the exit code. A part raises where a request was not answered right."""
    options = _parser().parse_args(arguments)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 16384)), hard))
    print(f"{commit()}, {cpu_name()}, {os.cpu_count()} cores, load before {os.getloadavg()[0]:.2f}")
    found: dict[str, float] = {}
    for name in options.parts:
        print(f"\n{name}:", flush=True)
        with tempfile.TemporaryDirectory(prefix="cx-gw-") as folder:
            found |= PARTS[name](options, Path(folder))
    print(f"\nload after: {os.getloadavg()[0]:.2f}\n\n{goals_table(found)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench gateway")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=tuple(PARTS),
        default=_BY_DEFAULT,
        help="default: all but soak",
    )
    relay = parser.add_argument_group("relay")
    relay.add_argument("--rounds", type=int, default=5, help="also of scaling")
    relay.add_argument("--requests", type=int, default=800, help="unary requests of a round")
    relay.add_argument("--streams", type=int, default=100)
    relay.add_argument("--chunks", type=int, default=100, help="chunks of a stream")
    relay.add_argument("--no-litellm", action="store_true")
    relay.add_argument(
        "--litellm-venv",
        type=Path,
        default=Path.home() / ".cache" / "cortexd-bench" / "litellm",
        help="environment of the LiteLLM proxy; made when it is not there",
    )
    others = parser.add_argument_group("the other parts")
    others.add_argument("--starts", type=int, default=9, help="starts of start")
    others.add_argument("--seconds", type=int, default=30, help="length of stall")
    others.add_argument("--cancels", type=int, default=50, help="cancels of each kind")
    others.add_argument("--cold-rounds", type=int, default=3, help="loads of cold")
    others.add_argument("--soak-requests", type=int, default=200_000)
    return parser
