"""Sleep: weights leave the device and come back; the cache's content does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cortexd import errors
from engine import engine as engine_module
from engine.cache import kv_cache
from engine.engine import Engine
from engine.sleep import tensors_of
from tests.engine.checkpoints import load_engine, make_oracle, random_prompt, save_oracle
from tests.engine.doubles import make_submit
from tests.engine.driving import OWNER, generate

PROMPT = random_prompt(40)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A hybrid on the CPU that is allowed to sleep, as a model on a GPU is."""
    monkeypatch.setattr(engine_module, "check_can_sleep", lambda *_, **__: None)
    # A GPU's memory can be given back while its tensor stays; a mapping in huge pages cannot.
    monkeypatch.setattr(kv_cache, "map_huge", lambda size: torch.zeros(size, dtype=torch.uint8))
    files = save_oracle(make_oracle("qwen3_5"), tmp_path / "model")
    return load_engine(files, backend="reference")


def resident_bytes(engine: Engine) -> int:
    held = [*tensors_of(engine.model), *tensors_of(engine.cache)]
    return sum(tensor.untyped_storage().nbytes() for tensor in held)


@torch.inference_mode()
def test_model_that_slept_answers_as_before(engine: Engine) -> None:
    """Nothing stays on the device meanwhile; a submission wakes it; no prefix is believed."""
    expected = generate(engine, PROMPT, max_tokens=5, ignore_eos=True)
    before = resident_bytes(engine)
    assert before >= engine.memory_bytes
    engine.sleep()
    assert engine.is_asleep
    assert resident_bytes(engine) == 0
    assert generate(engine, PROMPT, max_tokens=5, ignore_eos=True) == expected
    assert not engine.is_asleep
    assert resident_bytes(engine) == before
    assert engine.report("m").num_cached_tokens == 0


def test_sleep_while_a_request_runs_is_refused(engine: Engine) -> None:
    """The error says how many, and the request goes on."""
    engine.submit(OWNER, make_submit(PROMPT, max_tokens=2))
    with pytest.raises(errors.ServiceUnavailable, match="answers 1 sequences"):
        engine.sleep()
    assert not engine.is_asleep


def test_model_that_finds_no_room_to_wake_stays_asleep(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request gets the numbers; once there is room again, the model wakes."""
    engine.sleep()

    def no_room(storage: torch.UntypedStorage, size: int) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(torch.UntypedStorage, "resize_", no_room)
        with pytest.raises(errors.InsufficientMemory, match="bytes to wake"):
            engine.submit(OWNER, make_submit(PROMPT))
    assert engine.is_asleep
    assert len(generate(engine, PROMPT, max_tokens=3, ignore_eos=True)) == 3


def test_sleep_on_a_cpu_is_refused_with_the_reason(tmp_path: Path) -> None:
    """There the weights are in host memory already."""
    engine = load_engine(save_oracle(make_oracle("llama"), tmp_path / "model"))
    with pytest.raises(errors.InvalidRequest, match="runs on the cpu"):
        engine.sleep()
