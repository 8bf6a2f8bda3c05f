"""What loaded weights take, and the error when that is more than there is."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type

from cortexd.errors import InsufficientMemory
from engine import device as devices
from engine.formats.checkpoint import Checkpoint
from engine.formats.ggml import GGMLType
from engine.memory_check import check_weights_fit, resident_bytes
from tests.engine.checkpoints import load_engine, save_oracle
from tests.engine.gguf_export import Exporter
from tests.engine.stored_models import make_model, quantised


def test_estimate_is_near_what_is_loaded(tmp_path: Path) -> None:
    """Dense, quantised at load, and stored quantised: within a tenth of the engine's figure."""
    oracle = make_model("qwen3_5_moe_text", seed=80)
    dense = save_oracle(oracle, tmp_path / "m")
    stored = Exporter(oracle, Type.Q4_1).write(tmp_path / "m.gguf")
    for files, quant in ((dense, None), (quantised(dense, "q8_0"), GGMLType.Q8_0), (stored, None)):
        engine = load_engine(files, backend="reference")
        checkpoint = Checkpoint.open(files)
        estimate = resident_bytes(checkpoint.tensors.values(), 4, quant)
        checkpoint.close()
        loaded = engine.memory_bytes - engine.cache.memory_bytes
        # Looked-up rows and routers are not quantised at load, which this tiny model has many of.
        assert estimate == pytest.approx(loaded, rel=0.4 if quant else 0.1)


def test_too_little_memory_names_both_numbers_and_what_fits(tmp_path: Path) -> None:
    """A quarter of the memory is enough for q4_0 only, and a tenth for nothing."""
    files = save_oracle(make_model("qwen3", seed=81), tmp_path / "m")
    checkpoint = Checkpoint.open(files)
    tensors = list(checkpoint.tensors.values())
    needed = resident_bytes(tensors, 4)
    check_weights_fit(tensors, 4, None, available_bytes=needed, device="cpu")
    with pytest.raises(InsufficientMemory, match=r'would fit: quant = "q4_0"$') as caught:
        check_weights_fit(tensors, 4, None, available_bytes=needed // 4, device="cpu")
    assert caught.value.details == {"needed_bytes": needed, "available_bytes": needed // 4}
    with pytest.raises(InsufficientMemory, match=r"choose a smaller model$"):
        check_weights_fit(tensors, 4, None, available_bytes=needed // 10, device="cpu")


def test_engine_refuses_before_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is made with what the device has free."""
    files = save_oracle(make_model("qwen3", seed=82), tmp_path / "m")
    monkeypatch.setattr(devices, "free_memory_bytes", lambda device, world_size: 1000)
    with pytest.raises(InsufficientMemory, match=r"on cpu, 1000 are available"):
        load_engine(files)
