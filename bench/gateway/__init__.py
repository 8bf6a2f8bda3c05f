"""`python -m bench gateway`: what a relay adds between a client and an engine.

The same mock upstream directly, behind nginx, behind the LiteLLM proxy and behind cortexd with one
and two fronts; every round visits the targets in random order. Latencies are differences to
"direct" of the same round; CPU time is that of the target's whole process tree.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    # Lazy: the mock runs as a module of this package, and needs none of it.
    from bench.gateway.rounds import run

    return run(arguments)
