"""`python -m bench [NAME] [ARGS]`: run one benchmark; without a name, `demo`.

Each benchmark is a module (or package) of this folder with `main(arguments) -> exit code`. It puts
what it compares into one run and prints the machine's load: a busy machine's numbers mean little.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Final

BENCHMARKS: Final = {
    "demo": "start-up, prefill and decode of the demo model, as an HTTP client sees them",
    "rpc": "the leader's RPC per step, and steps on several ranks against one (needs [test])",
    "gateway": "what the gateway adds, beside nginx and LiteLLM on the same mock upstream",
    "exactness": "logits against transformers, architectures x formats x ways (needs [test])",
    "gpu": "the goals on one GPU, over random weights of real models' shapes",
    "load": "loading warm files, and opening a GGUF file with a vocabulary of 150,000 tokens",
    "rounding": "what rounded activations cost: perplexity of a text, with and without",
    "cpu": "the engine against llama.cpp and transformers on this CPU, file by file",
}


def main() -> int:
    """Run the benchmark named on the command line; return its exit code."""
    listing = "\n".join(f"  {name:12} {text}" for name, text in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=f"Benchmarks:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", default="demo", choices=tuple(BENCHMARKS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="handed to the benchmark")
    chosen = parser.parse_args()
    module = importlib.import_module(f"bench.{chosen.name}")
    code: int = module.main(chosen.arguments)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
