"""What is timed: whole engine steps, as the leader runs them."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from typing import Any, Final

from cortexd.messages.inference import SequenceDelta, Submit
from engine.engine import Engine
from engine.token_ids import pack_token_ids

_OWNER: Final = "bench.0"


def submit(engine: Engine, number: int, prompt: list[int], max_tokens: int, **fields: Any) -> None:
    """Queue a greedy request that runs to its length."""
    engine.submit(
        _OWNER,
        Submit(
            request_id=f"bench-{number}",
            sequence_id=number,
            prompt_token_ids=pack_token_ids(prompt),
            max_tokens=max_tokens,
            ignore_eos=True,
            **{"temperature": 0.0, **fields},
        ),
    )


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Return random token ids, small enough for any vocabulary."""
    generator = random.Random(seed)
    return [generator.randrange(90) for _ in range(length)]


def step(engine: Engine) -> list[SequenceDelta]:
    """Run one step; return what it told."""
    return engine.step().get(_OWNER, [])


def drain(engine: Engine) -> int:
    """Run to the end; return the number of tokens that came."""
    count = 0
    while engine.has_work:
        count += sum(len(delta.token_ids) for delta in step(engine))
    return count


def begin_decoding(engine: Engine, batch: int, context: int, num_steps: int) -> None:
    """Bring `batch` rows to where each step decodes, with graphs captured."""
    for number in range(batch):
        submit(engine, number, prompt_of(context, seed=number), num_steps + 16)
    while engine.scheduler.waiting or any(s.num_uncomputed > 1 for s in engine.scheduler.running):
        step(engine)
    for _ in range(8):  # compile, capture, replay
        step(engine)


def time_steps(engine: Engine, num_steps: int) -> list[float]:
    """Return the seconds of so many steps."""
    times = []
    for _ in range(num_steps):
        started = time.perf_counter()
        step(engine)
        times.append(time.perf_counter() - started)
    return times


def decode_step_s(engine: Engine, batch: int, context: int, num_steps: int) -> list[float]:
    """Return the times of decode steps of `batch` rows from `context` tokens on, warm."""
    begin_decoding(engine, batch, context, num_steps)
    times = time_steps(engine, num_steps)
    drain(engine)
    return times


def prefill_tok_s(engine: Engine, num_prompts: int, length: int) -> float:
    """Return prompt tokens per second of fresh prompts; a first round does not count."""
    rate = 0.0
    for seed in range(2):
        for number in range(num_prompts):
            submit(engine, number, prompt_of(length, seed=1000 * seed + number), 1)
        started = time.perf_counter()
        drain(engine)
        rate = num_prompts * length / (time.perf_counter() - started)
    return rate


def offline_tok_s(engine: Engine, num_requests: int = 256) -> float:
    """Return output tokens per second of requests of 100 to 1024 tokens in and out."""
    generator = random.Random(0)
    lengths = [generator.randint(100, 1024) for _ in range(num_requests)]
    outputs = [generator.randint(100, 1024) for _ in range(num_requests)]
    submit(engine, 0, prompt_of(64), 8)
    drain(engine)
    for number, (length, max_tokens) in enumerate(zip(lengths, outputs, strict=True)):
        submit(engine, number, prompt_of(length, seed=number), max_tokens, temperature=0.6)
    started = time.perf_counter()
    count = drain(engine)
    return count / (time.perf_counter() - started)


@dataclass(frozen=True, slots=True)
class Turns:
    """Seconds to the first token: of a conversation that is new, and of its next turn."""

    cold_s: float
    warm_s: float


def turns(engine: Engine, length: int, num_new: int) -> Turns:
    """Time a long prompt, then the same with more behind it."""
    prompt = prompt_of(length)
    drained = []
    for number, tokens in enumerate((prompt, prompt + prompt_of(num_new, seed=1))):
        submit(engine, number, tokens, 1)
        started = time.perf_counter()
        drain(engine)
        drained.append(time.perf_counter() - started)
    return Turns(*drained)


def interference(engine: Engine, num_decoding: int, length: int) -> float:
    """Return the 99th percentile of the time between tokens over its median, prompts arriving."""
    for number in range(num_decoding):
        submit(engine, number, prompt_of(512, seed=number), 400)
    while engine.scheduler.waiting or any(s.num_uncomputed > 1 for s in engine.scheduler.running):
        step(engine)
    times = []
    for count in range(360):
        if count % 120 == 60:
            submit(engine, 1000 + count, prompt_of(length, seed=count), 1)
        started = time.perf_counter()
        step(engine)
        times.append(time.perf_counter() - started)
    drain(engine)
    return statistics.quantiles(times, n=100)[98] / statistics.median(times)
