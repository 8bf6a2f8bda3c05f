"""The engine: the same answer however a sequence is computed, and how it ends."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from cortexd import errors
from cortexd.models import ModelFiles
from cortexd.settings import Engine as EngineSettings
from engine.batch import StepBatch
from engine.cache.kv_cache import KVCache
from engine.engine import Engine
from engine.loading.model_load import Model
from engine.preflight import inspect
from tests.engine.checkpoints import load_engine, make_oracle, random_prompt, save_oracle
from tests.engine.doubles import make_submit
from tests.engine.driving import (
    OWNER,
    Outcome,
    collect,
    generate,
    max_difference,
    record,
    run_to_end,
)

SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "min_p": 0.01, "ignore_eos": True}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """One tiny llama for the whole module."""
    return save_oracle(make_oracle("llama", seed=20), tmp_path_factory.mktemp("engine") / "llama")


def submit_all(engine: Engine, prompts: list[list[int]], **fields: Any) -> None:
    """Submit sequences 0, 1, ..."""
    for index, prompt in enumerate(prompts):
        engine.submit(OWNER, make_submit(prompt, sequence_id=index, **fields))


def last_logits(files: ModelFiles, prompt: list[int], **fields: Any) -> Tensor:
    """Return the logits after the prompt under these settings."""
    engine = load_engine(files, **fields)
    recorder = record(engine)
    generate(engine, prompt, max_tokens=1)
    return recorder.logits[0]


def test_one_pass_equals_chunked_equals_token_by_token(files: ModelFiles) -> None:
    """However the prompt is cut, logits agree, also across block boundaries."""
    prompt = random_prompt(61)
    whole = last_logits(files, prompt, max_prefill_chunk=64)
    for chunk in (16, 17, 33):
        chunked = last_logits(files, prompt, max_prefill_chunk=chunk)
        assert max_difference(whole, chunked) < 1e-5
    engine = load_engine(files)
    recorder = record(engine)
    engine.submit(OWNER, make_submit(prompt[:1], max_tokens=90, ignore_eos=True))
    engine.step()
    for token_id in prompt[1:]:
        # Teacher forcing: each next token is the prompt's own, whatever the model prefers.
        engine.scheduler.running[0].token_ids[-1] = token_id
        engine.step()
    assert max_difference(whole, recorder.logits[-1]) < 1e-5


def test_sixteen_at_once_equal_each_alone(files: ModelFiles) -> None:
    """Prefill and decode rows of many sequences in one step do not touch each other."""
    prompts = [random_prompt(3 + 7 * index, seed=index) for index in range(16)]
    alone = [
        generate(load_engine(files), prompt, max_tokens=12, ignore_eos=True) for prompt in prompts
    ]
    engine = load_engine(files)
    submit_all(engine, prompts, max_tokens=12, ignore_eos=True)
    outcomes = run_to_end(engine)
    assert [outcomes[index].token_ids for index in range(16)] == alone


def test_sequence_that_joins_midway_is_the_same_as_alone(files: ModelFiles) -> None:
    """Joining and leaving at any step changes nobody's tokens."""
    prompts = [random_prompt(20, seed=index) for index in range(3)]
    alone = [
        generate(load_engine(files), prompt, max_tokens=10, ignore_eos=True) for prompt in prompts
    ]
    engine = load_engine(files)
    outcomes: dict[int, Outcome] = defaultdict(Outcome)
    for index, prompt in enumerate(prompts):
        engine.submit(OWNER, make_submit(prompt, sequence_id=index, max_tokens=10, ignore_eos=True))
        for _ in range(3):
            collect(outcomes, engine.step())
    run_to_end(engine, outcomes)
    assert [outcomes[index].token_ids for index in range(3)] == alone


def test_preempted_sequences_go_on_undisturbed(files: ModelFiles) -> None:
    """With too few blocks for all, recomputed sequences still say the same, seeds included."""
    prompts = [random_prompt(20, seed=index) for index in range(6)]
    for fields in ({"ignore_eos": True}, {**SAMPLED, "seed": 3}):
        roomy = load_engine(files)
        submit_all(roomy, prompts, max_tokens=40, **fields)
        undisturbed = run_to_end(roomy)
        engine = load_engine(files, max_model_len=64)
        _limit_blocks(engine, 16)
        submit_all(engine, prompts, max_tokens=40, **fields)
        outcomes = run_to_end(engine)
        assert engine.report("m").num_preemptions > 0
        for index in range(6):
            assert outcomes[index].token_ids == undisturbed[index].token_ids


def _limit_blocks(engine: Engine, num_usable: int) -> None:
    """Take blocks away until so many are left; give none back."""
    pool = engine.scheduler.pool
    pool.allocate(pool.num_free - num_usable)
    pool.num_blocks = num_usable + 1


def test_scattered_blocks_equal_consecutive_ones(files: ModelFiles) -> None:
    """A block table in any order is gathered to the same result, bit for bit."""
    prompt = random_prompt(45)
    engine = load_engine(files)
    recorder = record(engine)
    generate(engine, prompt, max_tokens=8, ignore_eos=True)
    consecutive = torch.stack(recorder.logits)
    recorder.logits.clear()
    pool = engine.scheduler.pool
    held = pool.allocate(pool.num_free)
    pool.release(held[::2])  # no block's successor is free any more
    engine.submit(OWNER, make_submit(prompt, max_tokens=8, ignore_eos=True))
    while engine.has_work:
        engine.step()
    assert torch.equal(torch.stack(recorder.logits), consecutive)


def test_stale_nan_in_the_cache_harms_nobody(files: ModelFiles) -> None:
    """Whatever a block held before, only what its new holder wrote is read."""
    prompt = random_prompt(21)
    expected = generate(load_engine(files), prompt, max_tokens=8, ignore_eos=True)
    engine = load_engine(files)
    with torch.inference_mode():
        engine.cache.blocks.fill_(float("nan"))
    assert generate(engine, prompt, max_tokens=8, ignore_eos=True) == expected


def test_seeded_sampling_repeats_whatever_else_runs(files: ModelFiles) -> None:
    """The same seed gives the same text alone and in a crowd; another seed another one."""
    prompt = random_prompt(9)
    alone = generate(load_engine(files), prompt, max_tokens=20, seed=7, **SAMPLED)
    engine = load_engine(files)
    engine.submit(OWNER, make_submit(prompt, sequence_id=0, max_tokens=20, seed=7, **SAMPLED))
    for index in range(1, 8):
        other = random_prompt(5 * index, seed=index)
        engine.submit(
            OWNER, make_submit(other, sequence_id=index, max_tokens=20, seed=index, **SAMPLED)
        )
    assert run_to_end(engine)[0].token_ids == alone
    assert generate(engine, prompt, max_tokens=20, seed=8, **SAMPLED) != alone


def test_unseeded_sequences_differ(files: ModelFiles) -> None:
    """Without a seed, equal requests get their own draws."""
    engine = load_engine(files)
    submit_all(engine, [random_prompt(5)] * 4, max_tokens=20, **SAMPLED)
    texts = {tuple(outcome.token_ids) for outcome in run_to_end(engine).values()}
    assert len(texts) == 4


def test_end_token_stops_and_is_not_delivered(files: ModelFiles) -> None:
    """The stop token ends the sequence; min_tokens and ignore_eos hold it off."""
    prompt = random_prompt(11)
    engine = load_engine(files)
    free_run = generate(engine, prompt, max_tokens=12, ignore_eos=True)
    stop = free_run[4]
    first = free_run.index(stop)
    engine.submit(OWNER, make_submit(prompt, max_tokens=12, stop_token_ids=[stop]))
    outcome = run_to_end(engine)[1]
    assert (outcome.token_ids, outcome.finish_reason) == (free_run[:first], "stop")
    longer = generate(engine, prompt, max_tokens=12, stop_token_ids=[stop], min_tokens=first + 1)
    assert len(longer) > first
    assert stop not in longer


def test_ignore_eos_ignores_the_models_end_tokens_only(files: ModelFiles) -> None:
    """What the request itself names still stops it, as in vLLM."""
    prompt = random_prompt(11)
    engine = load_engine(files)
    free_run = generate(engine, prompt, max_tokens=12, ignore_eos=True)
    stop = free_run[4]
    first = free_run.index(stop)
    engine.spec = msgspec.structs.replace(engine.spec, eos_token_ids=(stop,))
    assert generate(engine, prompt, max_tokens=12) == free_run[:first]
    assert generate(engine, prompt, max_tokens=12, ignore_eos=True) == free_run
    named = generate(engine, prompt, max_tokens=12, ignore_eos=True, stop_token_ids=[stop])
    assert named == free_run[:first]


def test_deltas_tell_prompt_progress_and_length(files: ModelFiles) -> None:
    """One delta per step while the prompt prefills, then one per token, the last says why."""
    engine = load_engine(files)
    engine.submit(OWNER, make_submit(random_prompt(70), max_tokens=3, ignore_eos=True))
    outcome = run_to_end(engine)[1]
    assert [delta.num_prompt_tokens for delta in outcome.deltas] == [70, 70, 70, 0, 0]
    assert [len(delta.token_ids) for delta in outcome.deltas] == [0, 0, 1, 1, 1]
    assert outcome.finish_reason == "length"


def test_logprobs_come_with_every_token(files: ModelFiles) -> None:
    """Chosen and top log-probabilities run parallel to the tokens."""
    engine = load_engine(files)
    recorder = record(engine)
    engine.submit(OWNER, make_submit(random_prompt(4), max_tokens=3, num_logprobs=2))
    outcome = run_to_end(engine)[1]
    for delta, logits in zip(outcome.deltas, recorder.logits, strict=True):
        expected = logits.log_softmax(0).topk(2)
        assert delta.top_ids == [expected.indices.tolist()]
        assert delta.top_logprobs[0] == pytest.approx(expected.values.tolist(), abs=1e-6)
        assert delta.logprobs == [delta.top_logprobs[0][0]]


def test_cancel_frees_blocks_and_the_others_go_on(files: ModelFiles) -> None:
    """A running, a waiting and an unknown sequence can be cancelled between steps."""
    engine = load_engine(files, max_num_seqs=2)
    prompts = [random_prompt(30, seed=index) for index in range(4)]
    expected = generate(engine, prompts[1], max_tokens=9, ignore_eos=True)
    submit_all(engine, prompts, max_tokens=9, ignore_eos=True)
    outcomes: dict[int, Outcome] = defaultdict(Outcome)
    for _ in range(3):
        collect(outcomes, engine.step())
    used = engine.scheduler.pool.num_used
    engine.cancel(OWNER, 0)
    assert engine.scheduler.pool.num_used < used
    engine.cancel(OWNER, 3)
    engine.cancel(OWNER, 99)
    run_to_end(engine, outcomes)
    reasons = [outcomes[index].finish_reason for index in range(4)]
    assert reasons == ["cancelled", "length", "length", "cancelled"]
    assert outcomes[1].token_ids == expected


def test_cancel_owner_drops_all_its_sequences_silently(files: ModelFiles) -> None:
    """A dead front's work is freed; another front with the same ids is not touched."""
    engine = load_engine(files)
    for owner in ("front.0", "front.1"):
        for index in range(3):
            engine.submit(owner, make_submit(random_prompt(20), sequence_id=index, max_tokens=4))
    engine.step()
    engine.cancel("front.1", 0)
    engine.cancel_owner("front.1")
    owners = set()
    while engine.has_work:
        owners |= set(engine.step())
    assert owners == {"front.0"}
    assert engine.scheduler.pool.num_used == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_row_fails_alone(files: ModelFiles, value: float) -> None:
    """The bad row's request gets an error that names it; its neighbours finish as if alone."""
    prompts = [random_prompt(10, seed=index) for index in range(3)]
    expected = [
        generate(load_engine(files), prompt, max_tokens=6, ignore_eos=True) for prompt in prompts
    ]
    engine = load_engine(files)
    recorder = record(engine)
    submit_all(engine, prompts, max_tokens=6, ignore_eos=True)
    outcomes: dict[int, Outcome] = defaultdict(Outcome)
    collect(outcomes, engine.step())
    recorder.spoil = {1: value}
    run_to_end(engine, outcomes)
    assert outcomes[1].finish_reason == "error"
    assert outcomes[1].error is not None
    assert outcomes[1].error.code == errors.NonFiniteLogits.code
    assert "request-1" in outcomes[1].error.message
    assert [outcomes[0].token_ids, outcomes[2].token_ids] == [expected[0], expected[2]]


class SmallMemory:
    """A model whose device holds at most `max_tokens` tokens of activations."""

    def __init__(self, model: Model, max_tokens: int) -> None:
        self.model = model
        self.max_tokens = max_tokens

    @property
    def backend_name(self) -> str:
        """As the real model."""
        return self.model.backend_name

    def forward(self, batch: StepBatch, cache: KVCache) -> Tensor:
        """Run, or raise what torch raises when memory is exhausted."""
        if len(batch.token_ids) > self.max_tokens:
            raise torch.OutOfMemoryError("out of memory")
        return self.model.forward(batch, cache)


def test_out_of_memory_shrinks_steps_and_loses_nothing(files: ModelFiles) -> None:
    """Fewer tokens per step, fewer sequences at once; every answer is still right."""
    prompts = [random_prompt(40, seed=index) for index in range(3)]
    expected = [generate(load_engine(files), prompt, max_tokens=5) for prompt in prompts]
    engine = load_engine(files)
    engine.model = SmallMemory(engine.model, 18)
    submit_all(engine, prompts, max_tokens=5)
    outcomes = run_to_end(engine)
    assert [outcomes[index].token_ids for index in range(3)] == expected


def test_out_of_memory_alone_at_the_smallest_step_fails_the_request(files: ModelFiles) -> None:
    """What can never run is failed with a reason, and the engine goes on."""
    engine = load_engine(files)
    engine.model = SmallMemory(engine.model, 8)
    submit_all(engine, [random_prompt(40), random_prompt(5)], max_tokens=2)
    outcomes = run_to_end(engine)
    assert outcomes[0].error is not None
    assert outcomes[0].error.code == errors.InsufficientMemory.code
    assert outcomes[1].finish_reason == "length"


def test_submit_refuses_what_cannot_run(files: ModelFiles) -> None:
    """Too long, twice the same id, and more than the queue holds."""
    engine = load_engine(files, max_model_len=48, max_num_seqs=1, max_queue_depth=1)
    assert engine.limits.context == 48
    with pytest.raises(errors.ContextLengthExceeded, match="maximum context length is 48 tokens"):
        engine.submit(OWNER, make_submit([1] * 48))
    engine.submit(OWNER, make_submit([1], sequence_id=1))
    with pytest.raises(errors.InvalidValue, match="running already"):
        engine.submit(OWNER, make_submit([1], sequence_id=1))
    engine.submit(OWNER, make_submit([1], sequence_id=2))
    with pytest.raises(errors.Overloaded):
        engine.submit(OWNER, make_submit([1], sequence_id=3))
    engine.close()
    assert not engine.has_work


def test_context_is_bounded_by_the_cache(files: ModelFiles) -> None:
    """A cache smaller than the model's context limits what one sequence may have."""
    engine = load_engine(files, kv_cache_mib=1, block_size=256)
    block_bytes = 2 * 3 * 2 * 8 * 4 * 256
    usable = 2**20 // block_bytes - 1
    assert engine.limits.context == min(256, usable * 256)
    engine.submit(OWNER, make_submit(random_prompt(3), max_tokens=10_000, ignore_eos=True))
    outcome = run_to_end(engine)[1]
    assert len(outcome.token_ids) == engine.limits.context - 3


def test_report_counts_tokens_and_rates(files: ModelFiles) -> None:
    """Totals are exact; rates are positive once something ran."""
    engine = load_engine(files)
    submit_all(engine, [random_prompt(10), random_prompt(20)], max_tokens=5, ignore_eos=True)
    run_to_end(engine)
    report = engine.report("tiny")
    assert (report.num_prompt_tokens, report.num_generated_tokens) == (30, 10)
    assert (report.model_id, report.steps) == ("tiny", 5)
    assert report.tok_s_prefill > 0
    assert report.tok_s_decode > 0
    assert report.kv_blocks_used == 0
    assert report.kv_blocks_total == engine.scheduler.pool.num_usable
    assert "0 running, 0 waiting" in repr(engine)


def test_load_reports_progress_up_to_one(files: ModelFiles) -> None:
    """Fractions rise from the first weight to ready."""
    seen: list[tuple[float, str]] = []
    settings = EngineSettings(device="cpu", kv_cache_mib=1, num_threads=1)
    engine = Engine.load(files, inspect(files), settings, lambda *args: seen.append(args))
    assert [fraction for fraction, _ in seen] == sorted(fraction for fraction, _ in seen)
    assert seen[-1] == (1.0, "ready")
    assert engine.memory_bytes > 2**19
    assert (engine.device_name, engine.dtype_name) == ("cpu (1 threads)", "float32")
