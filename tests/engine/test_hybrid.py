"""Hybrid models: sequences that share steps and slots, faults in a state, and its memory.

That every way of computing a prompt gives the same numbers is tested in `test_ways.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cortexd.models import ModelFiles
from engine.batch import StepBatch
from engine.cache.kv_cache import KVCache
from tests.engine.checkpoints import (
    NATIVE_HYBRID,
    Oracle,
    load_engine,
    make_oracle,
    make_sharp_oracle,
    oracle_greedy,
    oracle_logits,
    random_prompt,
    save_oracle,
)
from tests.engine.doubles import make_submit
from tests.engine.driving import OWNER, max_difference, run_to_end
from tests.engine.ways import PROMPTS, whole

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["torch", "native"])
def oracle(request: pytest.FixtureRequest) -> Oracle:
    """A hybrid of sizes that only torch takes, and one whose steps are native."""
    return make_sharp_oracle(**(NATIVE_HYBRID if request.param == "native" else {}))


@pytest.fixture(scope="module")
def files(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """Its checkpoint."""
    return save_oracle(oracle, tmp_path_factory.mktemp("hybrid") / "model")


@pytest.mark.parametrize("fields", [{}, {**NATIVE_HYBRID, "shared_expert_intermediate_size": 64}])
@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_moe"])
def test_many_at_once_equal_each_alone(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """More sequences than slots: each says what transformers says, and no slot is left held."""
    oracle = make_oracle(kind, seed=41, **fields)
    engine = load_engine(save_oracle(oracle, tmp_path / kind), max_num_seqs=3)
    prompts = [random_prompt(3 + 11 * index, seed=index) for index in range(7)]
    for index, prompt in enumerate(prompts):
        engine.submit(OWNER, make_submit(prompt, sequence_id=index, max_tokens=6, ignore_eos=True))
    outcomes = run_to_end(engine)
    for index, prompt in enumerate(prompts):
        answer = outcomes[index].token_ids
        assert answer == oracle_greedy(oracle, prompt, answer, 6)
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
        answer = outcomes[index].token_ids
        assert answer == oracle_greedy(oracle, prompt, answer, 9)


def test_state_slots_are_counted_in_memory(tmp_path: Path) -> None:
    """Slots never take more than half the budget, limit how many run, and are reported."""
    files = save_oracle(make_sharp_oracle(), tmp_path / "model")
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
