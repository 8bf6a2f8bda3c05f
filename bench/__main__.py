"""`python -m bench [daemon | cpu]`: what a client sees (default), or the engine against others."""

from __future__ import annotations

import sys
from collections.abc import Callable


def main() -> int:
    """Run the benchmark that the first argument names; return the exit code."""
    name, *rest = [*sys.argv[1:], "daemon"] if len(sys.argv) < 2 else sys.argv[1:]
    runners: dict[str, Callable[[list[str]], int]] = {"daemon": _daemon, "cpu": _cpu}
    if name not in runners:
        print(f'benchmark "{name}" does not exist; choose one of: {", ".join(runners)}')
        return 2
    return runners[name](rest)


def _daemon(arguments: list[str]) -> int:
    from bench import daemon

    return daemon.main(arguments)


def _cpu(arguments: list[str]) -> int:
    from bench import cpu

    return cpu.main(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
