"""`python -m bench gateway`: what a gateway costs, beside nginx and LiteLLM, against its goals.

All real processes on this machine. The parts, each a module of its own: `relay` (latency, CPU time
and memory of a relay: the same mock upstream directly, behind nginx, the LiteLLM proxy and cortexd
with one and two fronts, in random turns; latencies are differences to "direct" of the same round,
CPU time is that of the target's whole process tree), `start`, `stall`, `cancel`, `cold`, `scaling`,
`scrape`, and, only when asked for, `soak`. The last thing printed is the table of the goals.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    # Lazy: the mock runs as a module of this package, and needs none of it.
    from bench.gateway.parts import run

    return run(arguments)
