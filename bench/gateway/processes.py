"""CPU time and memory of a process tree, from /proc: true also on a busy machine."""

from __future__ import annotations

from pathlib import Path

import psutil


def tree(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def cpu_ns(pid: int) -> int:
    """Return the CPU time of a process tree, in ns (schedstat of every thread)."""
    total = 0
    for process in tree(pid):
        for stat in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
            try:
                total += int(stat.read_text().split()[0])
            except OSError:  # the thread has ended
                continue
    return total


def rss_bytes(pid: int) -> int:
    """Return the private and shared resident memory of a process tree, shared pages once."""
    return sum(int(process.memory_full_info().pss) for process in tree(pid))
