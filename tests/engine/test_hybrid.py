"""Hybrid models: the recurrent state makes no difference to how a sequence may be computed.

Each way of computing is also run with its mechanism broken on purpose, and then must differ.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cortexd.models import ModelFiles
from engine import engine as engine_module
from engine.batch import StepBatch
from engine.engine import Engine
from engine.kv_cache import KVCache
from engine.layers import gated_delta_net
from engine.layers.delta_rule import DeltaInputs, chunk_delta_rule, recurrent_delta_rule
from engine.layers.gated_delta_net import GatedDeltaNet
from engine.scheduler import StepPlan
from engine.sequence import Sequence
from engine.state_cache import StateCache
from tests.engine.checkpoints import (
    Oracle,
    load_engine,
    make_oracle,
    oracle_greedy,
    oracle_logits,
    random_prompt,
    save_oracle,
)
from tests.engine.doubles import make_submit
from tests.engine.driving import OWNER, generate, max_difference, record, run_to_end

TOLERANCE = 1e-4
BROKEN = 1e-2  # what a broken mechanism must differ by at least
NUM_PROMPT = 150  # more than two chunks of 64
PROMPTS = {
    "random": random_prompt(NUM_PROMPT),
    "one token repeated": [5] * NUM_PROMPT,
    "two tokens in turn": [5, 6] * (NUM_PROMPT // 2),
    "phrase repeated": random_prompt(10) * (NUM_PROMPT // 10),
}


def make_sharp_oracle() -> Oracle:
    """Return a hybrid whose beta is 0 or 1 and which hardly forgets: the worst for a delta rule."""
    oracle = make_oracle("qwen3_5", seed=40)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if "in_proj_b" in name:
                parameter.mul_(40)
            elif "A_log" in name:
                parameter.fill_(-7)
    return oracle


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    """One hybrid for the whole module."""
    return make_sharp_oracle()


@pytest.fixture(scope="module")
def files(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """Its checkpoint."""
    return save_oracle(oracle, tmp_path_factory.mktemp("hybrid") / "model")


def whole(engine: Engine, prompt: list[int]) -> Tensor:
    """Return the logits after a prompt that is computed as the engine likes."""
    recorder = record(engine)
    generate(engine, prompt, max_tokens=1, ignore_eos=True)
    engine.model = recorder.model
    return recorder.logits[0]


def in_one_pass(files: ModelFiles, prompt: list[int]) -> Tensor:
    """Return the logits after a prompt that is computed at once."""
    return whole(load_engine(files, max_num_batched_tokens=512, max_prefill_chunk=512), prompt)


def in_uneven_chunks(files: ModelFiles, prompt: list[int]) -> Tensor:
    """Return the logits after a prompt cut every 17 tokens."""
    return whole(load_engine(files, max_prefill_chunk=17), prompt)


def in_chunks_of_64(files: ModelFiles, prompt: list[int]) -> Tensor:
    """Return the logits after a prompt cut where the delta rule cuts it."""
    return whole(load_engine(files, max_num_batched_tokens=64, max_prefill_chunk=64), prompt)


def token_by_token(files: ModelFiles, prompt: list[int]) -> Tensor:
    """Return the logits after a prompt that is fed one token a step."""
    engine = load_engine(files)
    recorder = record(engine)
    engine.submit(OWNER, make_submit(prompt[:1], max_tokens=len(prompt), ignore_eos=True))
    engine.step()
    for token_id in prompt[1:]:
        # Teacher forcing: each next token is the prompt's own, whatever the model prefers.
        engine.scheduler.running[0].token_ids[-1] = token_id
        engine.step()
    return recorder.logits[-1]


def among_others(files: ModelFiles, prompt: list[int]) -> Tensor:
    """Return the logits after a prompt whose chunks share steps with decoding sequences."""
    engine = load_engine(files, max_prefill_chunk=40)
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


def after_another(files: ModelFiles, prompt: list[int]) -> Tensor:
    """Return the logits after a prompt in a slot that others have used."""
    engine = load_engine(files, max_num_seqs=1)
    for seed in range(2):
        generate(engine, random_prompt(30, seed=seed), max_tokens=3, ignore_eos=True)
    return whole(engine, prompt)


def after_preemption(files: ModelFiles, prompt: list[int]) -> Tensor:
    """Return the logits after a prompt that lost its blocks and its slot halfway."""
    engine = load_engine(files)
    recorder = record(engine)
    engine.submit(OWNER, make_submit(prompt, max_tokens=1, ignore_eos=True))
    for _ in range(2):
        engine.step()
    scheduler = engine.scheduler
    assert scheduler.running[0].num_computed > 0
    scheduler._preempt(scheduler.running[0])
    assert scheduler.slots is not None
    assert scheduler.slots.num_used == 0
    while engine.has_work:
        engine.step()
    assert engine.report("m").num_preemptions == 1
    return recorder.logits[-1]


def after_a_snapshot(files: ModelFiles, prompt: list[int]) -> Tensor:
    """Return the logits after a prompt whose beginning another sequence has computed."""
    engine = load_engine(files)
    generate(engine, prompt[:-20], max_tokens=9, ignore_eos=True)
    generate(engine, random_prompt(50, seed=5), max_tokens=9, ignore_eos=True)
    logits = whole(engine, prompt)
    assert engine.report("m").num_cached_tokens == (NUM_PROMPT - 21) // 8 * 8
    return logits


WAYS: dict[str, Callable[[ModelFiles, list[int]], Tensor]] = {
    way.__name__: way
    for way in (
        in_one_pass,
        in_uneven_chunks,
        in_chunks_of_64,
        token_by_token,
        among_others,
        after_another,
        after_preemption,
        after_a_snapshot,
    )
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_equals_transformers(way: str, oracle: Oracle, files: ModelFiles) -> None:
    """One pass = any chunks = token by token = in a batch = in a used slot = after a restart."""
    for name, prompt in PROMPTS.items():
        expected = oracle_logits(oracle, prompt)
        assert max_difference(WAYS[way](files, prompt), expected) < TOLERANCE, name


def _forgets_decode_state(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(inputs: DeltaInputs, state: Tensor) -> tuple[Tensor, Tensor]:
        return recurrent_delta_rule(inputs, state)[0], state

    monkeypatch.setattr(gated_delta_net, "recurrent_delta_rule", broken)


def _forgets_state_between_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(inputs: DeltaInputs, state: Tensor) -> tuple[Tensor, Tensor]:
        return chunk_delta_rule(inputs, torch.zeros_like(state))

    monkeypatch.setattr(gated_delta_net, "chunk_delta_rule", broken)


def _forgets_convolution_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    original = GatedDeltaNet._convolve

    def broken(self: GatedDeltaNet, mixed: Tensor, batch: StepBatch, tails: Tensor) -> Tensor:
        return original(self, mixed, batch, tails.zero_())

    monkeypatch.setattr(GatedDeltaNet, "_convolve", broken)


def _keeps_what_a_slot_held(monkeypatch: pytest.MonkeyPatch) -> None:
    original = engine_module.build_batch

    def broken(plan: StepPlan, block_size: int, device: torch.device) -> StepBatch:
        batch = original(plan, block_size, device)
        batch.is_fresh.fill_(False)
        for row in batch.rows:
            row.is_fresh = False
        return batch

    monkeypatch.setattr(engine_module, "build_batch", broken)


def _shares_one_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    original = engine_module.build_batch

    def broken(plan: StepPlan, block_size: int, device: torch.device) -> StepBatch:
        batch = original(plan, block_size, device)
        batch.state_slots.fill_(1)
        for row in batch.rows:
            row.state_slot = 1
        return batch

    monkeypatch.setattr(engine_module, "build_batch", broken)


def _computes_on_after_preemption(monkeypatch: pytest.MonkeyPatch) -> None:
    original = engine_module.Scheduler._preempt

    def broken(self: engine_module.Scheduler, sequence: Sequence) -> None:
        num_computed, num_blocks = sequence.num_computed, len(sequence.block_table)
        original(self, sequence)
        sequence.num_computed = num_computed
        sequence.block_table = self.pool.allocate(num_blocks)

    monkeypatch.setattr(engine_module.Scheduler, "_preempt", broken)


def _loses_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StateCache, "copy", lambda *_: None)


MUTATIONS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "decode forgets": (_forgets_decode_state, "token_by_token"),
    "chunks forget": (_forgets_state_between_chunks, "in_uneven_chunks"),
    "tail lost, chunks": (_forgets_convolution_tail, "in_chunks_of_64"),
    "tail lost, decode": (_forgets_convolution_tail, "token_by_token"),
    "slot not cleared": (_keeps_what_a_slot_held, "after_another"),
    "slot shared": (_shares_one_slot, "among_others"),
    "state lost at preemption": (_computes_on_after_preemption, "after_preemption"),
    "snapshot lost": (_loses_snapshots, "after_a_snapshot"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_mechanism_is_seen(
    mutation: str, oracle: Oracle, files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above fails when the mechanism that it is about is broken."""
    break_it, way = MUTATIONS[mutation]
    break_it(monkeypatch)
    prompt = PROMPTS["random"]
    assert max_difference(WAYS[way](files, prompt), oracle_logits(oracle, prompt)) > BROKEN


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_moe"])
def test_many_at_once_equal_each_alone(kind: str, tmp_path: Path) -> None:
    """More sequences than slots: each says what transformers says, and no slot is left held."""
    oracle = make_oracle(kind, seed=41)
    engine = load_engine(save_oracle(oracle, tmp_path / kind), max_num_seqs=3)
    prompts = [random_prompt(3 + 11 * index, seed=index) for index in range(7)]
    for index, prompt in enumerate(prompts):
        engine.submit(OWNER, make_submit(prompt, sequence_id=index, max_tokens=6, ignore_eos=True))
    outcomes = run_to_end(engine)
    for index, prompt in enumerate(prompts):
        assert outcomes[index].token_ids == oracle_greedy(oracle, prompt, 6)
    assert engine.scheduler.slots is not None
    assert engine.scheduler.snapshots is not None
    assert engine.scheduler.slots.num_used == len(engine.scheduler.snapshots)


def test_nan_left_in_a_slot_harms_nobody(oracle: Oracle, files: ModelFiles) -> None:
    """A sequence whose state became NaN fails alone; the next one in its slot is exact."""
    engine = load_engine(files, max_num_seqs=1)
    assert engine.cache.states is not None
    with torch.inference_mode():
        engine.cache.states.recurrent.fill_(torch.nan)
        engine.cache.states.conv_tails.fill_(torch.nan)
    for prompt in (PROMPTS["random"], [3]):
        assert max_difference(whole(engine, prompt), oracle_logits(oracle, prompt)) < TOLERANCE


def test_out_of_memory_in_a_step_does_not_advance_the_state_twice(
    oracle: Oracle, files: ModelFiles
) -> None:
    """A step that fails at its end is computed again from the beginning of its sequences."""
    engine = load_engine(files, prefix_cache=False)
    model = engine.model
    num_rows: list[int] = []  # of each step
    failed: list[int] = []

    class FailsLate:
        """Runs out of memory in the second step and when two sequences decode first."""

        def forward(self, batch: StepBatch, cache: KVCache) -> Tensor:
            logits = model.forward(batch, cache)
            num_rows.append(len(batch.rows))
            if len(num_rows) == 2 or (batch.num_single_rows == 2 and len(failed) < 2):
                failed.append(batch.num_single_rows)
                raise torch.OutOfMemoryError("no memory for the head")
            return logits

    engine.model = FailsLate()
    prompts = [PROMPTS["random"][:80], PROMPTS["random"][90:120]]
    for index, prompt in enumerate(prompts):
        engine.submit(OWNER, make_submit(prompt, sequence_id=index, max_tokens=9, ignore_eos=True))
    outcomes = run_to_end(engine)
    assert failed == [1, 2], "a chunk beside a decode failed, and two decodes"
    for index, prompt in enumerate(prompts):
        assert outcomes[index].token_ids == oracle_greedy(oracle, prompt, 9)


def test_state_slots_are_counted_in_memory(files: ModelFiles) -> None:
    """Slots never take more than half the budget, limit how many run, and are reported."""
    roomy = load_engine(files)
    tight = load_engine(files, max_num_seqs=500, max_num_batched_tokens=512)
    assert roomy.cache.states is not None
    assert tight.cache.states is not None
    assert roomy.scheduler.max_running == 16
    slot_bytes = roomy.spec.state_bytes_per_sequence(4)
    assert roomy.cache.states.memory_bytes == (2 * 16 + 1) * slot_bytes  # snapshots, null slot
    assert tight.cache.states.memory_bytes <= 1 << 19
    assert tight.scheduler.slots is not None
    assert tight.scheduler.max_running == tight.scheduler.slots.num_slots < 500
    assert load_engine(files, prefix_cache=False).cache.states.memory_bytes == 17 * slot_bytes
    assert roomy.memory_bytes > roomy.cache.blocks.nbytes + roomy.cache.states.memory_bytes
    assert roomy.cache.blocks.shape[0] == 1, "only one layer of four has a KV cache"
