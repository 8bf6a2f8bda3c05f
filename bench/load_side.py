"""`python -m bench.load_side FILE THREADS`: load a GGUF file in this process, for `bench.load`.

Prints one JSON line: [seconds, CPU seconds] of the first load, and of one more, which finds the
memory of the first; the host of a virtual machine may hand out memory slower than it is written.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from bench.runner import cpu_seconds
from cortexd.models import ModelFiles, ModelSpec
from cortexd.settings import Engine as EngineSettings
from engine.engine import Engine
from engine.preflight import inspect

BLOCK_BYTES = 1 << 24


def main() -> int:
    """Load twice and print; return the exit code."""
    path, num_threads = sys.argv[1], int(sys.argv[2])
    _into_page_cache(Path(path))
    files = ModelFiles(model_id="bench", source="path", revision="", format="gguf", weights=(path,))
    settings = EngineSettings(num_threads=num_threads, kv_cache_mib=1024)
    spec = inspect(files)
    print(json.dumps([_timed(files, spec, settings) for _ in range(2)]))
    return 0


def _timed(files: ModelFiles, spec: ModelSpec, settings: EngineSettings) -> tuple[float, float]:
    cpu, wall = cpu_seconds(), time.perf_counter()
    engine = Engine.load(files, spec, settings, lambda fraction, stage: None)
    wall = time.perf_counter() - wall
    cpu = cpu_seconds() - cpu
    engine.close()
    return wall, cpu


def _into_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(BLOCK_BYTES):
            pass


if __name__ == "__main__":
    raise SystemExit(main())
