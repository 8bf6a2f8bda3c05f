"""`cortexd doctor`: try rank processes and their collectives on this host, without a model."""

from __future__ import annotations

import argparse

from cli.control import settings_of
from cli.exit_code import FAILURE, OK
from cortexd.errors import ConfigError


def doctor(args: argparse.Namespace) -> int:
    """Print one line for each stage that works, and what failed. Raises: ConfigError."""
    if args.devices is not None and len(args.devices) != args.tp:
        raise ConfigError(
            f"--devices names {len(args.devices)} devices and --tp is {args.tp}; "
            "allowed: exactly one device for each rank"
        )
    from actors.doctor import examine

    report = examine(settings_of(args).settings, args.tp, args.devices)
    for line in report.lines:
        print(line)
    if report.error is not None:
        print(f"failed: {report.error}\nstatus=failed")
        return FAILURE
    print("status=ok")
    return OK
