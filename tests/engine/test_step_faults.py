"""A step that raises: its requests fail, the engine goes on, and it ends when it should."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cortexd import errors
from cortexd.models import ModelFiles
from engine import device as devices
from engine import engine as engine_module
from engine.batch import StepBatch
from engine.cache.kv_cache import KVCache
from engine.engine import Engine
from engine.loading.model_load import Model
from engine.sampling import row_results
from engine.sampling.sampler import SampledToken, Sampler
from engine.scheduling.sequence import Sequence
from engine.scheduling.step_plan import StepPlan
from engine.step_faults import MAX_FAULTS_IN_A_ROW
from tests.engine.checkpoints import load_engine, make_oracle, random_prompt, save_oracle
from tests.engine.doubles import make_submit
from tests.engine.driving import OWNER, Outcome, collect, generate, run_to_end
from tests.engine.tp.ranks import engine_of

DEVICE_FAULT = RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.fixture(scope="module", params=["llama", "qwen3_5_text"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """A dense and a hybrid model."""
    oracle = make_oracle(request.param, seed=22)
    return save_oracle(oracle, tmp_path_factory.mktemp("faults") / request.param)


class Faulty:
    """A model that runs its layers, and then raises `error` for batches that `is_bad` picks."""

    def __init__(
        self, model: Model, error: Exception, is_bad: Callable[[StepBatch], bool] = lambda _: True
    ) -> None:
        self.model = model
        self.error = error
        self.is_bad = is_bad

    @property
    def backend_name(self) -> str:
        """As the real model."""
        return self.model.backend_name

    def forward(self, batch: StepBatch, cache: KVCache) -> Tensor:
        """Run, or write to the cache and raise."""
        logits = self.model.forward(batch, cache)
        if self.is_bad(batch):
            raise self.error
        return logits


def fail_on_token(engine: Engine, token_id: int, error: Exception) -> None:
    """Let every step that computes `token_id` raise."""
    engine.model = Faulty(engine.model, error, lambda batch: token_id in batch.token_ids.tolist())


def test_error_fails_the_requests_of_its_step_and_no_others(
    files: ModelFiles, caplog: pytest.LogCaptureFixture
) -> None:
    """Those in the step get a 500 and leave nothing behind; one that waited is answered."""
    good = random_prompt(20, seed=5)
    expected = generate(load_engine(files), good, max_tokens=6, ignore_eos=True)
    engine = load_engine(files, max_num_seqs=2)
    fail_on_token(engine, 3, ValueError("a bug"))
    prompts = [[token if token != 3 else 4 for token in random_prompt(30, seed=1)], [1, 2, 3], good]
    for index, prompt in enumerate(prompts):
        engine.submit(OWNER, make_submit(prompt, index, max_tokens=6, ignore_eos=True))
    with caplog.at_level(logging.ERROR):
        outcomes = run_to_end(engine)
    for index in (0, 1):
        error = outcomes[index].error
        assert error is not None
        assert error.to_exception().http_status == 500
        assert f"request-{index}" in error.message
        assert "a bug" not in error.message
    assert outcomes[2].token_ids == expected
    (record,) = [each for each in caplog.records if each.message == "engine.step_failed"]
    assert "request-0" in str(vars(record))
    assert "request-1" in str(vars(record))
    assert record.exc_info
    # What was shared before is still right.
    assert generate(engine, good, max_tokens=6, ignore_eos=True) == expected


def test_error_in_sampling_is_treated_alike(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask or penalty that raises has no other consequence than a layer that does."""
    engine = load_engine(files)
    real = Sampler.sample

    def sample(self: Sampler, logits: Tensor, sequences: list[Sequence]) -> list[SampledToken]:
        if any(each.submit.temperature > 0 for each in sequences):
            raise KeyError("a mask's bug")
        return real(self, logits, sequences)

    monkeypatch.setattr(Sampler, "sample", sample)
    engine.submit(OWNER, make_submit([1, 2], temperature=1.0))
    assert run_to_end(engine)[1].error is not None
    assert generate(engine, [1, 2], ignore_eos=True)


def test_error_that_recurs_is_raised(files: ModelFiles) -> None:
    """A good step in between starts the count anew; otherwise the process has to end."""
    engine = load_engine(files)
    fail_on_token(engine, 3, ValueError("a bug"))
    outcomes: dict[int, Outcome] = defaultdict(Outcome)
    for number in range(MAX_FAULTS_IN_A_ROW - 1):
        engine.submit(OWNER, make_submit([3], number))
        collect(outcomes, engine.step())
        assert outcomes[number].error is not None
    engine.submit(OWNER, make_submit([2], 10, max_tokens=1))
    collect(outcomes, engine.step())
    for number in range(20, 20 + MAX_FAULTS_IN_A_ROW):
        engine.submit(OWNER, make_submit([3], number))
        if number < 20 + MAX_FAULTS_IN_A_ROW - 1:
            collect(outcomes, engine.step())
    with pytest.raises(ValueError, match="a bug"):
        engine.step()


def test_lost_device_is_raised_at_once(files: ModelFiles) -> None:
    """No call to it succeeds after such an error: there is nothing to go on with."""
    engine = load_engine(files)
    engine.model = Faulty(engine.model, DEVICE_FAULT)
    engine.submit(OWNER, make_submit([1]))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine.step()


def test_error_behind_which_the_device_is_lost_is_raised(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel's fault may show late: the device is asked before the engine goes on."""
    monkeypatch.setattr(devices, "is_alive", lambda device: False)
    engine = load_engine(files)
    fail_on_token(engine, 3, ValueError("a bug"))
    engine.submit(OWNER, make_submit([3]))
    with pytest.raises(ValueError, match="a bug"):
        engine.step()


def test_out_of_memory_while_scoring_shrinks_the_step(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the logits need counts as well: the chunk is halved, and all scores still come."""
    prompt = random_prompt(60)
    engine = load_engine(files)
    real = row_results.score_tokens

    def score_tokens(logits: Tensor, token_ids: list[int], num_top: int) -> object:
        if len(token_ids) > 16:
            raise torch.OutOfMemoryError("out of memory")
        return real(logits, token_ids, num_top)

    monkeypatch.setattr(row_results, "score_tokens", score_tokens)
    engine.submit(OWNER, make_submit(prompt, num_prompt_logprobs=0, max_tokens=0))
    outcome = run_to_end(engine)[1]
    assert outcome.finish_reason == "length"
    scores = [delta.prompt_scores for delta in outcome.deltas if delta.prompt_scores is not None]
    assert sum(len(each.logprobs) for each in scores) == 59


def test_split_model_survives_errors_between_the_ranks_steps_only(tmp_path: Path) -> None:
    """Rank 0 alone samples: its errors part nobody. An error in the layers ends the group."""
    oracle = make_oracle("llama", seed=4, num_attention_heads=4, intermediate_size=96)
    files = save_oracle(oracle, tmp_path / "model")
    with engine_of(files, 2) as engine:
        expected = generate(engine, [1, 2, 3], ignore_eos=True)
        real, engine.sampler.sample = engine.sampler.sample, _raise  # type: ignore[method-assign]
        engine.submit(OWNER, make_submit([1, 2, 3]))
        error = run_to_end(engine)[1].error
        assert error is not None
        assert error.code == errors.Internal.code
        engine.sampler.sample = real  # type: ignore[method-assign]
        assert generate(engine, [1, 2, 3], ignore_eos=True) == expected
        engine.model = Faulty(engine.model, ValueError("a bug"))
        engine.submit(OWNER, make_submit([1]))
        with pytest.raises(ValueError, match="a bug"):
            engine.step()


def _raise(logits: Tensor, sequences: list[Sequence]) -> list[SampledToken]:
    raise KeyError("a bug")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), KeyError("a bug")])
def test_split_model_survives_errors_before_the_workers_hear_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Nobody is in a collective yet. A state that was to be kept in that step still is."""
    files = save_oracle(make_oracle("qwen3_5_text", seed=4), tmp_path / "model")
    prompt = random_prompt(100, 3)
    with engine_of(files, 1, max_model_len=128) as whole:
        expected = generate(whole, prompt, max_tokens=4, ignore_eos=True)
    num_failures = 0
    with engine_of(files, 2, max_model_len=128) as engine:
        plans: list[StepPlan] = []
        real_plan, real_build = engine.scheduler.plan, engine_module.build_batch

        def plan() -> StepPlan:
            plans.append(real_plan())
            return plans[-1]

        def build(*arguments: object) -> StepBatch:
            nonlocal num_failures
            if plans[-1].state_copies and not num_failures:
                num_failures += 1
                raise error
            return real_build(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(engine.scheduler, "plan", plan)
        monkeypatch.setattr(engine_module, "build_batch", build)
        engine.submit(OWNER, make_submit(prompt, 1, max_tokens=4, ignore_eos=True))
        assert run_to_end(engine)[1].error is not None
        again = generate(engine, prompt, max_tokens=4, ignore_eos=True)
        assert engine.scheduler.prefix_cache.num_hit_tokens > 0
    assert again == expected
