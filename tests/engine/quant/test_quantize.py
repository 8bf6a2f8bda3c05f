"""Quantising: the same bytes as the reference where it can quantise, small errors elsewhere."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from engine.formats.ggml import GGMLType
from engine.formats.in_situ import in_situ_names, in_situ_type, type_for_columns
from engine.quant import quantize
from engine.quant.quantize import quantize_rows

# Relative error on Gaussian rows; the legacy types' are the reference quantiser's own.
LARGEST_ERROR = {
    "Q8_0": 0.0055,
    "Q4_0": 0.087,
    "Q4_1": 0.079,
    "Q5_0": 0.044,
    "Q5_1": 0.039,
    "Q4_K": 0.073,
    "Q5_K": 0.037,
    "Q6_K": 0.019,
}
LEGACY = [name for name in LARGEST_ERROR if not name.endswith("_K")]


def gaussian(num_rows: int = 40, num_columns: int = 512, seed: int = 0) -> Tensor:
    """Return rows of ordinary weights."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, num_columns, generator=generator) * 0.05


@pytest.mark.parametrize("name", LARGEST_ERROR)
def test_round_trip_error_is_small(name: str) -> None:
    """Values come back within the type's error, and as the reference dequantiser reads them."""
    rows = gaussian()
    packed = quantize_rows(rows, GGMLType[name])
    back = packed.dequantize(torch.float32)
    assert float((back - rows).norm() / rows.norm()) < LARGEST_ERROR[name]
    kind = gguf.GGMLQuantizationType[name]
    assert np.array_equal(gguf.quants.dequantize(packed.packed.numpy(), kind), back.numpy())


@pytest.mark.parametrize("name", LEGACY)
def test_bytes_equal_the_reference(name: str) -> None:
    """All but a few ties are quantised to the reference's very bytes."""
    rows = gaussian(seed=1)
    expected = torch.from_numpy(gguf.quants.quantize(rows.numpy(), gguf.GGMLQuantizationType[name]))
    packed = quantize_rows(rows, GGMLType[name]).packed
    assert float((packed == expected).float().mean()) > 0.9999


@pytest.mark.parametrize("name", LARGEST_ERROR)
def test_peculiar_rows_come_back(name: str) -> None:
    """Zeros, a constant, tiny values, one outlier, all negative, all positive: finite and near."""
    rows = torch.zeros(6, 256)
    rows[1] = 0.37
    rows[2] = torch.linspace(-1e-3, 1e-3, 256)
    rows[3, 77] = 100.0
    rows[4] = -torch.linspace(1.0, 2.0, 256)
    rows[5] = torch.linspace(3.0, 3.1, 256)
    back = quantize_rows(rows, GGMLType[name]).dequantize(torch.float32)
    assert torch.isfinite(back).all()
    assert torch.equal(back[0], rows[0])
    # A level of the coarsest type, over the row's peak.
    tolerance = rows.abs().amax(-1, keepdim=True) / 7
    assert bool(((back - rows).abs() <= tolerance).all())
    assert float(back[3, 77]) == pytest.approx(100.0, rel=0.01)


def test_slabs_and_dtypes_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are independent of each other; bfloat16 rows are what they are in float32."""
    rows = gaussian().bfloat16()
    whole = quantize_rows(rows, GGMLType.Q4_K).packed
    assert torch.equal(quantize_rows(rows.float(), GGMLType.Q4_K).packed, whole)
    monkeypatch.setattr(quantize, "SLAB_ELEMENTS", {"cpu": 1500})
    assert torch.equal(quantize_rows(rows, GGMLType.Q4_K).packed, whole)


@pytest.mark.parametrize("spelling", ["q4k", "Q4_K", "q4-k", "Q4K"])
def test_names_are_read_in_any_spelling(spelling: str) -> None:
    """Case and separators do not matter; types that need a file are not among them."""
    assert in_situ_type(spelling) is GGMLType.Q4_K
    assert "q4_k" in in_situ_names()
    assert in_situ_type("q4_k_m") is None
    assert in_situ_type("iq2_xs") is None


def test_rows_that_fit_no_large_block_take_a_smaller_one() -> None:
    """K types fall back to blocks of 32, and other rows stay dense."""
    assert type_for_columns(GGMLType.Q4_K, 512) is GGMLType.Q4_K
    assert type_for_columns(GGMLType.Q4_K, 96) is GGMLType.Q5_0
    assert type_for_columns(GGMLType.Q6_K, 96) is GGMLType.Q8_0
    assert type_for_columns(GGMLType.Q8_0, 48) is None
