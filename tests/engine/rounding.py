"""How far bfloat16 takes the engine, measured against transformers in bfloat16 and in float32.

Some of the tiny random models are ill-conditioned: after seven tokens transformers' own bfloat16
logits of the dense hybrid have a cosine of 0.94 to its float32 ones. So the distance to float32
says little by itself: it must not be much larger than transformers' own. Where both round at the
same places, the distance between the two is a hundred times smaller, and shows a state, a norm or
a gate that is not kept in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median

import torch
from torch import Tensor

from engine.engine import Engine
from tests.engine.checkpoints import Oracle, oracle_logits, random_prompt
from tests.engine.driving import generate, record

PROMPTS = [random_prompt(length, seed) for length in (1, 7, 33, 75) for seed in range(3)]
# A best token is another one if float32 has it this many standard deviations below its own. With
# experts, rounding sends a token to another one now and then: after few prompts it may be so.
LARGEST_GAP = 0.25
MOST_OTHER_TOKENS = 2
# The engine's distance to float32, in distances of transformers; the constant is bfloat16's own
# step, for models where theirs happens to be next to nothing.
MOST_TIMES = 2.0
SLACK = 2e-4


@dataclass(frozen=True, slots=True)
class Answers:
    """Logits after each prompt: the engine's, and transformers' in both dtypes."""

    ours: list[Tensor]
    rounded: list[Tensor]
    exact: list[Tensor]

    @property
    def to_rounded(self) -> float:
        """The engine's mean distance to transformers in bfloat16."""
        return mean(map(_distance, self.ours, self.rounded))

    @property
    def num_other_tokens(self) -> int:
        """After how many prompts the engine's best token is not that of float32, nor near it."""
        gaps = [
            float((exact.max() - exact[ours.argmax()]) / exact.std())
            for ours, exact in zip(self.ours, self.exact, strict=True)
        ]
        return sum(gap > LARGEST_GAP for gap in gaps)

    def check(self) -> None:
        """Check that the engine is about as near to float32 as transformers in bfloat16 is."""
        # Medians: a mean would be the distance of the one prompt that is ill-conditioned.
        ours = median(map(_distance, self.ours, self.exact))
        theirs = median(map(_distance, self.rounded, self.exact))
        assert ours <= MOST_TIMES * theirs + SLACK, f"{ours:.2g}, transformers {theirs:.2g}"
        assert self.num_other_tokens <= MOST_OTHER_TOKENS


def answer(engine: Engine, oracle: Oracle, prompts: Sequence[list[int]] = PROMPTS) -> Answers:
    """Return what an engine that computes in bfloat16 and its float32 oracle say to prompts."""
    recorder = record(engine)
    for prompt in prompts:
        generate(engine, prompt, max_tokens=1, ignore_eos=True)
    rounded = _in_bfloat16(oracle)
    return Answers(
        [logits.cpu() for logits in recorder.logits],
        [oracle_logits(rounded, prompt) for prompt in prompts],
        [oracle_logits(oracle, prompt) for prompt in prompts],
    )


def _in_bfloat16(oracle: Oracle) -> Oracle:
    """Return a copy with bfloat16 parameters, as if it had been loaded in that dtype."""
    rounded: Oracle = copy.deepcopy(oracle).to(torch.bfloat16)
    for module, exact in zip(rounded.modules(), oracle.modules(), strict=True):
        # The conversion rounds the rope frequencies too; loading does not.
        module._buffers.update(exact._buffers)
    return rounded


def _distance(left: Tensor, right: Tensor) -> float:
    """Return 1 - cosine."""
    return 1 - float(torch.cosine_similarity(left.double(), right.double(), dim=0))
