"""Products with quantised weights on Triton against dequantising in torch."""

from __future__ import annotations

import pytest
import torch

from engine.formats.ggml import GGMLType
from engine.kernels.triton.planes import PLANE_TYPES, Planes, split_planes
from engine.kernels.triton.quant_linear import MAX_TOKENS, dequantize_rows, multiply
from engine.quant.tensor import QuantizedTensor
from tests.engine.kernels.quantized import random_rows
from tests.engine.kernels.triton.cases import DEVICE, random

TYPES = sorted(PLANE_TYPES)
NUM_ROWS, NUM_COLUMNS = 37, 512


def make(ggml_type: GGMLType, columns: int = NUM_COLUMNS) -> tuple[QuantizedTensor, Planes]:
    """Return a random matrix in both forms."""
    rows = random_rows(ggml_type.name, NUM_ROWS, columns)
    weight = QuantizedTensor(ggml_type, rows.shape, rows.packed.contiguous()).to(DEVICE)
    return weight, split_planes(weight)


@pytest.mark.parametrize("ggml_type", TYPES)
def test_rows_come_back_as_they_were(ggml_type: GGMLType) -> None:
    """By range and by id, to the last bit."""
    weight, planes = make(ggml_type)
    expected = weight.dequantize(torch.float32)
    torch.testing.assert_close(dequantize_rows(planes, torch.float32, (0, NUM_ROWS)), expected)
    torch.testing.assert_close(dequantize_rows(planes, torch.float32, (5, 9)), expected[5:9])
    ids = torch.tensor([36, 0, 7, 7], device=DEVICE)
    torch.testing.assert_close(dequantize_rows(planes, torch.float32, ids), expected[ids])


@pytest.mark.parametrize("ggml_type", TYPES)
def test_planes_take_hardly_more_than_the_blocks(ggml_type: GGMLType) -> None:
    """Kept quantised means that memory does not grow."""
    weight, planes = make(ggml_type)
    assert weight.num_bytes <= planes.num_bytes <= weight.num_bytes * 1.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 3, MAX_TOKENS])
@pytest.mark.parametrize("ggml_type", TYPES)
def test_products_equal_the_reference(
    ggml_type: GGMLType, num_tokens: int, dtype: torch.dtype
) -> None:
    """One token by sums, several by tiles."""
    weight, planes = make(ggml_type)
    x = random(num_tokens, NUM_COLUMNS, dtype=dtype)
    expected = x.float() @ weight.dequantize(torch.float32).T
    difference = (multiply(x, planes).float() - expected).abs().max()
    assert difference < (1e-5 if dtype == torch.float32 else 2e-2) * expected.abs().max()


@pytest.mark.parametrize("ggml_type", [kind for kind in TYPES if kind.block_elements == 32])
def test_rows_of_an_odd_number_of_blocks_are_multiplied(ggml_type: GGMLType) -> None:
    """The last step along a row is only partly there."""
    weight, planes = make(ggml_type, columns=96)
    x = random(1, 96)
    torch.testing.assert_close(multiply(x, planes), x @ weight.dequantize(torch.float32).T)
