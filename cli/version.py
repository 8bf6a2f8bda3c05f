"""`cortexd version`."""

from __future__ import annotations

import argparse
import platform

from cli.exit_code import OK
from cortexd import __version__


def version(args: argparse.Namespace) -> int:
    """Print the version of cortexd and of the Python that runs it."""
    print(f"cortexd {__version__} (python {platform.python_version()}, {platform.machine()})")
    return OK
