"""The table of `python -m bench exactness`: its rows are exact, and it says what it lacks."""

from __future__ import annotations

import importlib.util

import pytest

from bench import exactness
from engine.models.registry import REGISTRY
from tests.engine.stored_models import FORMATS

# Three rows on every run, one of each format with the slow tests; the command prints all.
QUICK = [("qwen2", "safetensors bf16"), ("qwen3_moe", "in-situ q4_0"), ("qwen3_next", "GGUF q8_0")]
CASES = [
    pytest.param(
        exactness.ARCHITECTURES[index % len(exactness.ARCHITECTURES)],
        stored_as,
        marks=pytest.mark.slow,
    )
    for index, stored_as in enumerate(FORMATS)
]


def test_table_has_every_architecture() -> None:
    """A new architecture must get its rows."""
    assert sorted(exactness.ARCHITECTURES) == sorted(REGISTRY)
    assert set(exactness.HYBRIDS) == {name for name, entry in REGISTRY.items() if entry.is_hybrid}


@pytest.mark.parametrize(("architecture", "stored_as"), [*QUICK, *CASES])
def test_row_is_exact(architecture: str, stored_as: str) -> None:
    """Every way of computing a prompt, on what the format made of the weights."""
    row = exactness.exact_row(architecture, stored_as)
    assert row.keys() == exactness.COLUMNS.keys()
    assert (row["snapshot"] is not None) == (architecture in exactness.HYBRIDS)
    for column, difference in row.items():
        assert difference is None or difference < exactness.TOLERANCE, column


def test_missing_transformers_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command says what to install instead of failing at an import."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else real(name)
    )
    assert exactness.main([]) == 2
    assert "transformers is not installed" in capsys.readouterr().out
    assert exactness.main(["gpt9"]) == 2
