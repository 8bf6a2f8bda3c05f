"""Dequantisation against the gguf package's own dequantiser, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from engine.formats.ggml import BLOCK_SIZES, QUANTIZED_TYPES, GGMLType
from engine.quant.tensor import QuantizedTensor, concatenate_rows
from tests.engine.model_files import random_blocks

ROWS, COLUMNS = 7, 512
TYPES = sorted(QUANTIZED_TYPES)


def _random(ggml_type: GGMLType, rows: int = ROWS, seed: int = 0) -> QuantizedTensor:
    library_type = gguf.GGMLQuantizationType(ggml_type)
    packed = random_blocks(np.random.default_rng(seed), library_type, rows, COLUMNS)
    return QuantizedTensor(ggml_type, (rows, COLUMNS), torch.from_numpy(packed))


def _oracle(tensor: QuantizedTensor) -> torch.Tensor:
    library_type = gguf.GGMLQuantizationType(tensor.ggml_type)
    return torch.from_numpy(gguf.quants.dequantize(tensor.packed.numpy(), library_type))


def test_type_table_equals_the_library() -> None:
    """Every GGML type has the library's number, name and block size."""
    ours = {(t.name, t.value): BLOCK_SIZES[t] for t in GGMLType}
    theirs = {(t.name, t.value): s for t, s in gguf.GGML_QUANT_SIZES.items()}
    assert ours == theirs


@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_dequantize_random_blocks_equals_library(ggml_type: GGMLType) -> None:
    """All values of random blocks are equal in float32."""
    tensor = _random(ggml_type)
    assert torch.equal(tensor.dequantize(torch.float32), _oracle(tensor))


@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_dequantize_rows_equals_those_rows_of_the_whole(ggml_type: GGMLType) -> None:
    """A subset by ids (repeated, unordered) or by slice is the same as of the whole matrix."""
    tensor = _random(ggml_type)
    whole = _oracle(tensor)
    ids = torch.tensor([5, 0, 5, 3])
    assert torch.equal(tensor.dequantize(torch.float32, ids), whole[ids])
    assert torch.equal(tensor.dequantize(torch.float32, slice(2, 5)), whole[2:5])
    assert tensor.dequantize(torch.float32, ids[:0]).shape == (0, COLUMNS)


def test_dequantize_to_bfloat16_rounds_the_float32_value() -> None:
    """Other dtypes are the float32 value, rounded once."""
    tensor = _random(GGMLType.Q6_K)
    assert torch.equal(tensor.dequantize(torch.bfloat16), _oracle(tensor).bfloat16())


def test_concatenate_rows_stacks_without_dequantising() -> None:
    """Packed rows on top of each other are the stacked matrices."""
    first, second = _random(GGMLType.Q4_K), _random(GGMLType.Q4_K, rows=3, seed=1)
    stacked = concatenate_rows([first, second])
    assert stacked.shape == (ROWS + 3, COLUMNS)
    expected = torch.cat((_oracle(first), _oracle(second)))
    assert torch.equal(stacked.dequantize(torch.float32), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_dequantize_on_cuda_equals_library(ggml_type: GGMLType) -> None:
    """The device gives the same bits."""
    tensor = _random(ggml_type)
    values = tensor.to("cuda").dequantize(torch.float32)
    assert torch.equal(values.cpu(), _oracle(tensor))
