"""`python -m bench demo`: start the daemon with the demo model and measure what a client sees.

Prints start-up times, prefill and decode speed at batch 1 and 8 over HTTP, and the machine's load
before and after, because numbers from a busy machine mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from bench.servers import free_port, wait_until

MODEL = "smollm2-135m-instruct"
NUM_TOKENS = 128
NUM_ROUNDS = 3
PROMPT_WORDS = 400


def main(arguments: Sequence[str]) -> int:
    """Run all measurements; return the exit code."""
    argparse.ArgumentParser(prog="python -m bench demo").parse_args(arguments)
    print(f"load before: {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(prefix="cx-bench-") as directory:
        base, process = _start(Path(directory))
        try:
            _measure(base)
        finally:
            process.terminate()
            process.wait(60)
    print(f"load after:  {os.getloadavg()[0]:.2f}")
    return 0


def _start(directory: Path) -> tuple[str, subprocess.Popen[bytes]]:
    ports = [free_port() for _ in range(3)]
    environment = {
        **os.environ,
        "CORTEXD_GATEWAY__LISTEN": f"127.0.0.1:{ports[0]}",
        "CORTEXD_GATEWAY__METRICS_LISTEN": f"127.0.0.1:{ports[1]}",
        "CORTEXD_NEURON__LISTEN": f"127.0.0.1:{ports[2]}",
        "CORTEXD_PATHS__RUNTIME_DIR": str(directory / "run"),
        "CORTEXD_PATHS__STATE_DIR": str(directory / "state"),
    }
    # Fetch first: a download is not what is measured here.
    subprocess.run([sys.executable, "-m", "cortexd", "pull", _demo_model()], check=True)
    base = f"http://127.0.0.1:{ports[0]}"
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "cortexd", "start", "--demo"],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    wait_until(lambda: _get(f"{base}/livez") == 200, "the front", timeout_s=60.0, period_s=0.005)
    print(f"start -> front answers:      {time.perf_counter() - started:6.2f} s")
    _complete(base, "Hello", 1)
    print(f"start -> first token:        {time.perf_counter() - started:6.2f} s")
    return base, process


def _measure(base: str) -> None:
    _complete(base, "warm up", 16)
    prompt = "word " * PROMPT_WORDS
    prefill = []
    for number in range(NUM_ROUNDS):
        started = time.perf_counter()
        usage = _complete(base, f"{number} {prompt}", 1)
        prefill.append(usage["prompt_tokens"] / (time.perf_counter() - started))
    print(f"prefill, {PROMPT_WORDS}-word prompt:    {statistics.median(prefill):6.0f} tok/s")
    for batch in (1, 8):
        speeds = [_decode_speed(base, batch) for _ in range(NUM_ROUNDS)]
        print(f"decode, batch {batch}:             {statistics.median(speeds):6.1f} tok/s")


def _decode_speed(base: str, batch: int) -> float:
    """Return tokens per second over `batch` parallel answers, their short prefill included."""
    threads = [
        threading.Thread(target=_complete, args=(base, f"Tell a story about {number}", NUM_TOKENS))
        for number in range(batch)
    ]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return batch * NUM_TOKENS / (time.perf_counter() - started)


def _complete(base: str, prompt: str, max_tokens: int) -> dict[str, int]:
    body = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"{base}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        usage: dict[str, int] = json.load(response)["usage"]
    if usage["completion_tokens"] != max_tokens:
        raise RuntimeError(f"expected {max_tokens} tokens, got {usage}")
    return usage


def _demo_model() -> str:
    from cortexd.demo import DEMO_MODEL

    return DEMO_MODEL


def _get(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return int(response.status)
    except urllib.error.URLError:
        return 0
