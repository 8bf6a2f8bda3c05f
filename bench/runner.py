"""One side of a comparison: a process with a loaded model that measures what it is told to.

Used by `bench.cpu`, which talks to all sides in turns. Commands and answers are lines, the same as
those of `llama_driver.cpp`; `serve` is the Python sides' half of it.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Load:
    """`tokens` steps of `batch` sequences after prompts of `prompt` tokens; batch 0: prefill."""

    batch: int
    prompt: int
    tokens: int

    @property
    def command(self) -> str:
        """The line that asks for it."""
        if self.batch == 0:
            return f"prefill {self.prompt}"
        return f"decode {self.batch} {self.prompt} {self.tokens}"

    @property
    def num_tokens(self) -> int:
        """Tokens that the measured time is for."""
        return self.batch * self.tokens if self.batch else self.prompt


@dataclass(frozen=True)
class Sample:
    """Seconds of one run: on the clock, and of CPU time over all threads."""

    wall_s: float
    cpu_s: float


class Runner:
    """A running side; `measure` is one round trip."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def measure(self, load: Load) -> Sample:
        """Run the load and return its time."""
        assert self._process.stdin is not None
        self._process.stdin.write(load.command + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return Sample(answer["wall_s"], answer["cpu_s"])

    def close(self) -> int:
        """End the process; return its exit code."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(60)

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} ended with {self._process.wait()}")
        answer: dict[str, float] = json.loads(line)
        return answer


class Side(Protocol):
    """A model in this process. What `timed` gets as its argument is what is measured."""

    def prefill(self, num_tokens: int, timed: Timed) -> None: ...
    def decode(self, batch: int, num_prompt: int, num_tokens: int, timed: Timed) -> None: ...


Timed = Callable[[Callable[[], object]], None]


def serve(side: Side) -> int:
    """Answer commands until stdin ends; return the exit code."""
    print('{"ready": true}', flush=True)
    for line in sys.stdin:
        command, first, *rest = line.split()
        if command == "prefill":
            side.prefill(int(first), _timed)
        else:
            side.decode(int(first), int(rest[0]), int(rest[1]), _timed)
    return 0


def _timed(run: Callable[[], object]) -> None:
    cpu, wall = cpu_seconds(), time.perf_counter()
    run()
    wall = time.perf_counter() - wall
    print(json.dumps({"wall_s": wall, "cpu_s": cpu_seconds() - cpu}), flush=True)


def cpu_seconds() -> float:
    """Return the CPU time of this process, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
