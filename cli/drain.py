"""`cortexd drain on|off`: let this host finish what runs and take nothing new, or take it again."""

from __future__ import annotations

import argparse

from cli.control import connected, settings_of
from cli.exit_code import OK


def drain(args: argparse.Namespace) -> int:
    """Switch draining on or off; `off` after a daemon's restart is not needed."""
    is_on = args.state == "on"
    with connected(settings_of(args).settings) as channel:
        answer = channel.request("drain", {"on": is_on})
    running = answer.get("in_flight", 0)
    print(f"draining: no new requests, {running} still run" if is_on else "taking requests")
    return OK
