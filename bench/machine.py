"""What a result is told with: commit, CPU; and where benchmarks keep and find their files."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def commit() -> str:
    """Return the commit of the working tree, "-dirty" behind it when it differs."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def cpu_name() -> str:
    """Return the CPU's own name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def default_cache_dir() -> Path:
    """Return the folder for llama.cpp and model files."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "cortexd" / "bench"


def demo_file() -> Path:
    """Return the demo model's file, fetched when it is not there yet."""
    import threading

    from cortexd import paths
    from cortexd.demo import DEMO_MODEL
    from cortexd.settings import Store
    from engine.sources import resolve

    store = Store()
    cache_dir = paths.cache_dir(store)
    files = resolve(DEMO_MODEL, None, store, cache_dir, lambda *stage: None, threading.Event())
    return Path(files.weights[0])
