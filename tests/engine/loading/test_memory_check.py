"""What loaded weights take, and the error when that is more than there is."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type

from cortexd.errors import InsufficientMemory
from engine import device as devices
from engine.formats.checkpoint import Checkpoint
from engine.loading.memory_check import check_weights_fit, resident_bytes
from engine.preflight import inspect_and_weigh
from tests.engine.checkpoints import load_engine, save_oracle
from tests.engine.gguf_export import Exporter
from tests.engine.stored_models import make_model, quantised


@pytest.mark.parametrize("quant", [None, "q8_0", "q4_0", "stored"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_moe_text"])
def test_estimate_is_what_is_loaded(family: str, quant: str | None, tmp_path: Path) -> None:
    """Dense, quantised at load, and stored quantised; tied or not: nearly the engine's figure."""
    for is_tied in (False, True):
        oracle = make_model(family, seed=80, tie_word_embeddings=is_tied)
        directory = tmp_path / str(is_tied)
        if quant == "stored":
            directory.mkdir()
            files = Exporter(oracle, Type.Q4_1).write(directory / "m.gguf")
        else:
            files = save_oracle(oracle, directory)
            files = files if quant is None else quantised(files, quant)
        engine = load_engine(files, backend="reference")
        loaded = engine.memory_bytes - engine.cache.memory_bytes
        _, weights = inspect_and_weigh(files)
        assert weights.in_32_bit == pytest.approx(loaded, rel=0.03)
        if quant in weights.if_quantised:
            assert weights.if_quantised[quant] <= weights.in_32_bit


def test_too_little_memory_names_both_numbers_and_what_fits(tmp_path: Path) -> None:
    """Four tenths of the memory are enough for quantised weights only, and a tenth for nothing."""
    files = save_oracle(make_model("qwen3", seed=81), tmp_path / "m")
    checkpoint = Checkpoint.open(files)
    tensors = {name: checkpoint[name] for name in checkpoint.tensors}

    def check(available_bytes: int) -> None:
        check_weights_fit(
            tensors, 4, None, is_tied=False, available_bytes=available_bytes, device="cpu"
        )

    needed = resident_bytes(tensors, 4)
    check(needed)
    options = 'quant = "q8_0", quant = "q4_0"'
    with pytest.raises(InsufficientMemory, match=f"would fit: {options}$") as caught:
        check(needed * 4 // 10)
    assert caught.value.details == {"needed_bytes": needed, "available_bytes": needed * 4 // 10}
    with pytest.raises(InsufficientMemory, match=r"choose a smaller model$"):
        check(needed // 10)


def test_engine_refuses_before_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is made with what the device has free."""
    files = save_oracle(make_model("qwen3", seed=82), tmp_path / "m")
    monkeypatch.setattr(devices, "free_memory_bytes", lambda device, world_size: 1000)
    with pytest.raises(InsufficientMemory, match=r"on cpu, 1000 are available"):
        load_engine(files)
