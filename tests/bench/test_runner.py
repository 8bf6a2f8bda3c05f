"""The lines that the sides of `bench cpu` exchange."""

from __future__ import annotations

import sys

import pytest

from bench.runner import Load, Runner

# A side that answers the sizes it was told as its times.
SIDE = """

from bench import runner

class Side:
    def prefill(self, num_tokens, timed):
        timed(lambda: sizes.append(num_tokens))
    def decode(self, batch, num_prompt, num_tokens, timed):
        timed(lambda: sizes.append((batch, num_prompt, num_tokens)))

sizes = []
code = runner.serve(Side())
assert sizes == [512, (8, 128, 32)], sizes
raise SystemExit(code)
"""


def test_load_counts_the_tokens_of_what_is_timed() -> None:
    """Prompts are not part of a decode run."""
    assert (Load(0, 512, 0).command, Load(0, 512, 0).num_tokens) == ("prefill 512", 512)
    assert (Load(8, 128, 32).command, Load(8, 128, 32).num_tokens) == ("decode 8 128 32", 256)


def test_runner_measures_both_kinds_of_load() -> None:
    """A round trip each, and the side ends with its input."""
    runner = Runner([sys.executable, "-c", SIDE])
    for load in (Load(0, 512, 0), Load(8, 128, 32)):
        sample = runner.measure(load)
        assert sample.wall_s >= 0
        assert sample.cpu_s >= 0
    assert runner.close() == 0


def test_runner_says_when_its_side_is_gone() -> None:
    """Instead of waiting for an answer that cannot come."""
    with pytest.raises(RuntimeError, match="ended with 3"):
        Runner([sys.executable, "-c", "raise SystemExit(3)"])
