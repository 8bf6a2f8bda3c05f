"""`cortexd reload`: let the daemon read its catalogue again, and say what that changed."""

from __future__ import annotations

import argparse

from cli.control import Document, connected, settings_of
from cli.exit_code import OK, CommandError
from cli.models import documents


def reload(args: argparse.Namespace) -> int:
    """Read the watched files again. Raises: CommandError when one of them cannot be used."""
    with connected(settings_of(args).settings) as channel:
        files = documents(channel.request("reload", {}).get("files"))
    if not files:
        print("nothing to reload: no models_config is configured")
    rejected = [file for file in files if file.get("status") == "rejected"]
    for file in files:
        if file not in rejected:
            print(_report(file))
    if rejected:
        errors = "\n".join(str(file.get("error")) for file in rejected)
        raise CommandError(f"{errors}\nthe version before it stays in force", 2)
    return OK


def _report(file: Document) -> str:
    changes = file.get("changes")
    lines = [f"{file.get('file')}: {file.get('status')}"]
    lines += [f"  {change}" for change in changes] if isinstance(changes, list) else []
    return "\n".join(lines)
