"""Hybrids and experts in the whole-step call, against the torch layers and against itself.

The ways of computing a prompt, and what a broken mechanism changes, are in `test_ways.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cortexd.models import ModelFiles
from engine.batch import build_batch
from engine.engine import Engine
from engine.kernels import cpu
from tests.engine.checkpoints import NATIVE_HYBRID, load_engine, make_oracle, save_oracle
from tests.engine.doubles import make_submit
from tests.engine.driving import OWNER, generate, record, run_to_end
from tests.engine.stored_models import store_model

PROMPTS = [[(7 * i + 3 * n) % 90 for i in range(n)] for n in range(5, 21)]
LONG = PROMPTS[-1] * 4  # 80 tokens: three chunks


def prefill_and_decode(engine: Engine) -> Tensor:
    """Return the logits of a long prompt's last token and of three generated ones."""
    recorder = record(engine)
    generate(engine, LONG, max_tokens=4, ignore_eos=True)
    engine.model = recorder.model
    return torch.stack(recorder.logits)


@pytest.mark.parametrize(
    ("stored_as", "tolerance"),
    # Activations of 16 bits; beside dense weights they are not rounded at all.
    [("GGUF q8_0", 5e-3), ("GGUF bf16", 1e-5), ("in-situ q4_0", 5e-3)],
)
@pytest.mark.parametrize("architecture", ["qwen3_5", "qwen3_next", "qwen3_moe", "qwen3_5_moe"])
def test_native_logits_match_the_reference(
    architecture: str, stored_as: str, tolerance: float, tmp_path: Path
) -> None:
    """GGUF files order V heads in another way than safetensors, and may store projections fused."""
    model = store_model(architecture, stored_as, tmp_path / "model")
    logits = {}
    for backend, name in (("reference", "reference"), ("auto", "native")):
        engine = load_engine(model.files, backend=backend)
        assert engine.backend_name == name
        logits[name] = prefill_and_decode(engine)[0]
    difference = (logits["native"] - logits["reference"]).norm()
    assert difference < tolerance * logits["reference"].norm()


# What a kernel has code of its own for: columns of S by 16, 32 and 128, tails of 1 to 7 inputs.
SHAPES = [
    {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 2},
    {"linear_key_head_dim": 32, "linear_value_head_dim": 48, "linear_conv_kernel_dim": 4},
    {"linear_key_head_dim": 48, "linear_value_head_dim": 176, "linear_conv_kernel_dim": 8},
]


@pytest.fixture(params=SHAPES, ids=["narrow", "mixed", "wide"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> ModelFiles:
    """A hybrid with experts in float32, so that nothing but the order of sums differs."""
    fields = {**NATIVE_HYBRID, "shared_expert_intermediate_size": 32, **request.param}
    return save_oracle(make_oracle("qwen3_5_moe", seed=7, **fields), tmp_path / "model")


def test_every_instruction_set_matches_the_reference(files: ModelFiles, isa: str) -> None:
    """Prefill in chunks and decode, on sizes for each of the kernels."""
    reference = prefill_and_decode(load_engine(files, backend="reference", kv_cache_mib=16))
    native = load_engine(files, kv_cache_mib=16)
    assert native.backend_name == "native"
    assert (prefill_and_decode(native) - reference).abs().max() < 1e-4


def test_bits_do_not_depend_on_chunks_and_threads(files: ModelFiles, isa: str) -> None:
    """The rule runs over a sequence's tokens in one order, whoever computes them."""
    whole = prefill_and_decode(
        load_engine(files, kv_cache_mib=16, max_num_batched_tokens=128, max_prefill_chunk=128)
    )
    for num_threads, chunk in ((1, 33), (3, 64), (2, 1)):
        engine = load_engine(files, kv_cache_mib=16, max_prefill_chunk=chunk)
        cpu.set_num_threads(num_threads)
        assert torch.equal(prefill_and_decode(engine), whole)


def test_text_is_the_same_alone_and_among_sixteen(tmp_path: Path) -> None:
    """Experts compute a token by itself, however many others they get."""
    model = store_model("qwen3_5_moe", "GGUF q8_0", tmp_path / "model", backend="auto")
    engine = model.load(kv_cache_mib=8)
    alone = [generate(engine, prompt, max_tokens=12, ignore_eos=True) for prompt in PROMPTS]
    for number, prompt in enumerate(PROMPTS):
        engine.submit(OWNER, make_submit(prompt, number, max_tokens=12, ignore_eos=True))
    outcomes = run_to_end(engine)
    assert [outcomes[number].token_ids for number in range(len(PROMPTS))] == alone


@dataclass(frozen=True)
class Row:
    """One planned sequence's first three tokens."""

    state_slot: int
    start: int = 0
    num_tokens: int = 3
    num_logits: int = 3
    token_ids: tuple[int, ...] = (5, 6, 7)
    block_table: tuple[int, ...] = (1,)


@torch.inference_mode()
def test_poisoned_sequence_stays_alone(files: ModelFiles) -> None:
    """NaN in a sequence's own state reaches its logits, and nobody else's."""
    engine = load_engine(files, kv_cache_mib=16)
    states = engine.cache.states
    assert states is not None
    rows = [Row(1, block_table=(1,)), Row(2, block_table=(2,))]
    batch = build_batch(rows, 8, torch.device("cpu"))
    clean = engine.model.forward(batch, engine.cache)
    batch.is_fresh.fill_(False)
    states.recurrent.zero_()
    states.conv_tails.zero_()
    states.recurrent[:, 1].fill_(torch.nan)
    logits = engine.model.forward(batch, engine.cache)
    assert logits[:3].isnan().all()
    assert torch.equal(logits[3:], clean[3:])


@pytest.mark.parametrize("slot", [-1, 10**6])
def test_state_slot_out_of_range_is_refused(files: ModelFiles, slot: int) -> None:
    """A wrong slot would overwrite foreign memory."""
    engine = load_engine(files, kv_cache_mib=16)
    batch = build_batch([Row(slot)], 8, torch.device("cpu"))
    with torch.inference_mode(), pytest.raises(AssertionError, match="out of range"):
        engine.model.forward(batch, engine.cache)


def test_sizes_without_kernels_stay_in_torch(tmp_path: Path) -> None:
    """A head that is not in sixteens keeps the torch layers, with native products."""
    fields = {**NATIVE_HYBRID, "linear_value_head_dim": 24}
    engine = load_engine(save_oracle(make_oracle("qwen3_5", **fields), tmp_path / "model"))
    assert engine.backend_name == "native linears"
    assert len(generate(engine, PROMPTS[0], max_tokens=2, ignore_eos=True)) == 2
