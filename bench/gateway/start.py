"""How long a gateway takes to start, and what its front weighs when nothing runs."""

from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import time
from pathlib import Path
from typing import Final

import psutil

from bench.gateway import targets
from bench.gateway.processes import pss_bytes

_DEADLINE_S: Final = 60.0
_SETTLE_S: Final = 3.0
_REQUEST: Final = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def measure_start(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Start a gateway again and again; print and return its times and its front's memory.

    Files are in the page cache after the first time, which is not counted.
    """
    answers, readys = [], []
    with targets.mock(1.0) as upstream:
        for number in range(options.starts + 1):
            gateway = targets.prepared(folder / f"start{number}", upstream.port, 1)
            answer_s, ready_s = _one_start(gateway)
            if number:
                answers.append(answer_s)
                readys.append(ready_s)
        with targets.cortexd(folder / "idle", upstream.port, 1) as running:
            time.sleep(_SETTLE_S)
            front = psutil.Process(running.pids()["front.0"])
            rss_mib = front.memory_info().rss / 2**20
            pss_mib = pss_bytes(front) / 2**20
    for what, times in (("the first 200", answers), ('the line "ready"', readys)):
        shown = " ".join(f"{seconds:.2f}" for seconds in sorted(times))
        print(f"cold start, exec to {what}: median {statistics.median(times):.2f} s of {shown}")
    print(f"idle front: RSS {rss_mib:.1f} MiB, PSS {pss_mib:.1f} MiB")
    return {"start s": statistics.median(answers), "front rss mib": rss_mib}


def _one_start(gateway: targets.Prepared) -> tuple[float, float]:
    """Return the seconds to the first answer and to when all actors are ready."""
    started = time.perf_counter()
    process = subprocess.Popen(gateway.command, stdout=subprocess.PIPE)
    try:
        answer_s = _first_answer(gateway.port, started)
        assert process.stdout is not None, "it is a pipe"
        line = process.stdout.readline()
        if not line.rstrip().endswith(b"ready"):
            raise RuntimeError(f"the gateway began with {line!r}")
        return answer_s, time.perf_counter() - started
    finally:
        process.terminate()
        process.communicate()


def _first_answer(port: int, started: float) -> float:
    """Return when the first request was answered: the root listens before its front serves."""
    while time.perf_counter() - started < _DEADLINE_S:
        try:
            with socket.create_connection(("127.0.0.1", port), _DEADLINE_S) as client:
                client.sendall(_REQUEST)
                if client.recv(4096).startswith(b"HTTP/1.1 200"):
                    return time.perf_counter() - started
        except ConnectionRefusedError:
            time.sleep(0.002)
    raise TimeoutError(f"no answer within {_DEADLINE_S:g} s")
