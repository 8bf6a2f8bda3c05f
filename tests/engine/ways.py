"""The ways in which one prompt can be computed, each giving the logits after its last token.

Whatever the way, the numbers must be the same. The tests compare them for single models, and break
each way's mechanism on purpose (`mutations.py`); `python -m bench exactness` prints them as a table
over all architectures and formats.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from engine.engine import Engine
from tests.engine.checkpoints import random_prompt
from tests.engine.doubles import make_submit
from tests.engine.driving import OWNER, generate, record

Load = Callable[..., Engine]  # settings of the engine as keywords
Way = Callable[[Load, list[int]], Tensor]

NUM_PROMPT = 150  # more than two chunks of 64, which the delta rule takes at once
END_TOKEN = 96  # the tiny models' own, which chat templates put between messages
# Text that repeats itself makes keys that are nearly parallel; special tokens stand where chunks
# and blocks are cut.
PROMPTS = {
    "random": random_prompt(NUM_PROMPT),
    "one token repeated": [5] * NUM_PROMPT,
    "two tokens in turn": [5, 6] * (NUM_PROMPT // 2),
    "phrase repeated": random_prompt(10) * (NUM_PROMPT // 10),
    "end tokens at the cuts": [
        END_TOKEN if position % 16 in {0, 15} or position % 17 == 0 else token
        for position, token in enumerate(random_prompt(NUM_PROMPT, seed=1))
    ],
}


def whole(engine: Engine, prompt: list[int]) -> Tensor:
    """Return the logits after a prompt that is computed as the engine likes."""
    recorder = record(engine)
    generate(engine, prompt, max_tokens=1, ignore_eos=True)
    engine.model = recorder.model
    return recorder.logits[0]


def in_one_pass(load: Load, prompt: list[int]) -> Tensor:
    """Compute the prompt at once."""
    return whole(load(max_num_batched_tokens=512, max_prefill_chunk=512), prompt)


def in_uneven_chunks(load: Load, prompt: list[int]) -> Tensor:
    """Cut the prompt every 17 tokens."""
    return whole(load(max_prefill_chunk=17), prompt)


def in_chunks_of_64(load: Load, prompt: list[int]) -> Tensor:
    """Cut the prompt where the delta rule cuts it."""
    return whole(load(max_num_batched_tokens=64, max_prefill_chunk=64), prompt)


def token_by_token(load: Load, prompt: list[int]) -> Tensor:
    """Feed the prompt one token a step."""
    engine = load()
    recorder = record(engine)
    engine.submit(OWNER, make_submit(prompt[:1], max_tokens=len(prompt), ignore_eos=True))
    engine.step()
    for token_id in prompt[1:]:
        # Teacher forcing: each next token is the prompt's own, whatever the model prefers.
        engine.scheduler.running[0].token_ids[-1] = token_id
        engine.step()
    return recorder.logits[-1]


def among_others(load: Load, prompt: list[int]) -> Tensor:
    """Let the prompt's chunks share steps with decoding sequences."""
    engine = load(max_prefill_chunk=40)
    for index in range(3):
        other = random_prompt(5 + index, seed=index)
        engine.submit(OWNER, make_submit(other, sequence_id=index, max_tokens=30, ignore_eos=True))
    engine.step()
    recorder = record(engine)
    engine.submit(OWNER, make_submit(prompt, sequence_id=9, max_tokens=1, ignore_eos=True))
    while 9 in {s.sequence_id for s in [*engine.scheduler.running, *engine.scheduler.waiting]}:
        count = len(recorder.logits)
        engine.step()
    assert len(recorder.logits) - count == 4, "the three others decoded in the same step"
    return recorder.logits[-1]


def after_another(load: Load, prompt: list[int]) -> Tensor:
    """Compute the prompt in blocks and a state slot that others have used."""
    engine = load(max_num_seqs=1)
    for seed in range(2):
        generate(engine, random_prompt(30, seed=seed), max_tokens=3, ignore_eos=True)
    return whole(engine, prompt)


def after_preemption(load: Load, prompt: list[int]) -> Tensor:
    """Take the prompt's blocks and its slot away halfway."""
    engine = load()
    recorder = record(engine)
    engine.submit(OWNER, make_submit(prompt, max_tokens=1, ignore_eos=True))
    for _ in range(2):
        engine.step()
    scheduler = engine.scheduler
    assert scheduler.running[0].num_computed > 0
    scheduler._preempt(scheduler.running[0])
    assert scheduler.slots is None or scheduler.slots.num_used == 0
    while engine.has_work:
        engine.step()
    assert engine.report("m").num_preemptions == 1
    return recorder.logits[-1]


def after_a_hit(load: Load, prompt: list[int]) -> Tensor:
    """Take the beginning of the prompt over from a sequence that has just computed it."""
    engine = load()
    generate(engine, prompt[:-20], max_tokens=9, ignore_eos=True)
    logits = whole(engine, prompt)
    _check_hit(engine, prompt)
    return logits


def after_a_snapshot(load: Load, prompt: list[int]) -> Tensor:
    """Take it over when other sequences have meanwhile used every other block and slot."""
    engine = load(max_num_seqs=3)
    generate(engine, prompt[:-20], max_tokens=9, ignore_eos=True)
    for seed in range(4):
        generate(engine, random_prompt(50, seed=5 + seed), max_tokens=9, ignore_eos=True)
    logits = whole(engine, prompt)
    _check_hit(engine, prompt)
    return logits


def _check_hit(engine: Engine, prompt: list[int]) -> None:
    """Check that the blocks before the cut, and only they, were not computed again."""
    stable = len(prompt) - 20
    if engine.cache.states is not None:
        marks = [i + 1 for i, token in enumerate(prompt[:stable]) if token == END_TOKEN]
        stable = max([mark for mark in marks if mark < stable], default=stable - 1)
    assert engine.report("m").num_cached_tokens >= stable // 8 * 8 > 0


WAYS: dict[str, Way] = {
    way.__name__: way
    for way in (
        in_one_pass,
        in_uneven_chunks,
        in_chunks_of_64,
        token_by_token,
        among_others,
        after_another,
        after_preemption,
        after_a_hit,
        after_a_snapshot,
    )
}
