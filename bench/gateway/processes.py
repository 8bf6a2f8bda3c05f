"""CPU time and memory of a process tree, from /proc: true also on a busy machine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import psutil


def tree(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def cpu_ns(pid: int) -> Counter[str]:
    """Return the CPU time of a process tree by name, in ns (schedstat of every thread)."""
    used: Counter[str] = Counter()
    for process in tree(pid):
        folder = Path(f"/proc/{process.pid}")
        for stat in folder.glob("task/*/schedstat"):
            try:
                used[(folder / "comm").read_text().strip()] += int(stat.read_text().split()[0])
            except OSError:  # the thread has ended
                continue
    return used


def wait_s(pid: int) -> float:
    """Return how long a process's main thread has been ready to run and had no core."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


def pss_bytes(process: psutil.Process) -> int:
    """Return the resident memory of one process, what it shares divided by who shares it."""
    return int(process.memory_full_info().pss)


def rss_bytes(pid: int) -> int:
    """Return the private and shared resident memory of a process tree, shared pages once."""
    return sum(map(pss_bytes, tree(pid)))
