"""`python -m bench gpu [--goals G1,G3]`: the GPU goals, measured on one device in ten minutes.

Weights are random, of the real models' shapes: speed does not depend on their values. The ceilings
that the ratios refer to, a copy's bandwidth and a matrix product's rate, are measured in the same
run. Refuses to run without a CUDA device.
"""

from __future__ import annotations

import argparse
import sys

from bench.gpu.goals import GOALS, Goal


def main(arguments: list[str]) -> int:
    """Measure the chosen goals and print their table; return the exit code."""
    known = {goal.name: goal for goal in GOALS}
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    parser.add_argument("--goals", default=",".join(known), help="comma-separated; default: all")
    chosen = parser.parse_args(arguments).goals.split(",")
    unknown = [name for name in chosen if name not in known]
    if unknown:
        parser.error(f"unknown goals {unknown}; there are {', '.join(known)}")
    import torch

    if not torch.cuda.is_available():
        print(
            "bench gpu: torch sees no CUDA device, and these are measurements of one; run it on a "
            "machine with an NVIDIA GPU and a CUDA build of torch",
            file=sys.stderr,
        )
        return 2
    _measure([known[name] for name in chosen])
    return 0


def _measure(goals: list[Goal]) -> None:
    from bench.gpu.ceilings import describe_device, measure_ceilings
    from bench.gpu.runs import Runs

    print(describe_device())
    ceilings = measure_ceilings()
    print(f"measured: copy {ceilings.copy_tb_s:.2f} TB/s, product {ceilings.matmul_tflop_s:.0f}")
    print(f"{'':4} {'goal':58} {'measured':>22} {'of ceiling':>10} {'must':>12} {'aim':>12}")
    runs = Runs(ceilings)
    for goal in goals:
        try:
            result = goal.run(runs)
        except Exception as error:  # one goal's failure must not cost the others their run
            print(f"{goal.name:4} {goal.text:58} failed: {error!r}", flush=True)
            continue
        ratio = "" if result.of_ceiling is None else f"{result.of_ceiling:.0%}"
        row = f"{goal.name:4} {goal.text:58} {result.text:>22} {ratio:>10}"
        print(f"{row} {goal.must:>12} {goal.aim:>12}", flush=True)
