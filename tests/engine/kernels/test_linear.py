"""Packed matrix products against dequantised weights and against their exact definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels import cpu
from engine.kernels.cpu import PackedLinear, reference
from tests.engine.kernels.quantized import TYPES, Rows, exact_parts, random_rows

SHAPES = dict.fromkeys(("Q4_K", "Q5_K", "Q6_K", "IQ4_XS"), (37, 512))
DENSE_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ODD_SHAPE = (37, 288)  # rows not in sixteens, columns not in sixty-fours


def packed_of(rows: Rows, bias: Tensor | None = None, *, is_exact: bool = False) -> PackedLinear:
    packed = cpu.pack([rows], bias, is_exact=is_exact)
    assert packed is not None
    return packed


def tokens(num_tokens: int, size: int, seed: int = 1) -> Tensor:
    return torch.randn(num_tokens, size, generator=torch.Generator().manual_seed(seed))


# Relative to the whole output: 8-bit activations have half a step of 1/127 of a block's largest.
@pytest.mark.parametrize(("is_exact", "tolerance"), [(True, 3e-5), (False, 8e-3)])
@pytest.mark.parametrize("name", TYPES)
def test_linear_is_as_exact_as_dequantised_weights(
    name: str, is_exact: bool, tolerance: float, isa: str
) -> None:
    rows = random_rows(name, *SHAPES.get(name, ODD_SHAPE))
    bias = tokens(1, rows.shape[0])[0]
    x = tokens(11, rows.shape[1])
    expected = x @ rows.dequantize().T + bias
    got = cpu.linear(packed_of(rows, bias, is_exact=is_exact), x)
    assert (got - expected).norm() <= tolerance * (expected - bias).norm()


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize("name", TYPES)
def test_linear_has_the_bits_of_its_definition(name: str, is_exact: bool, isa: str) -> None:
    rows = random_rows(name, *SHAPES.get(name, ODD_SHAPE))
    x = tokens(7, rows.shape[1]) * torch.logspace(-20, 3, 7)[:, None]
    expected = reference.linear(*exact_parts(rows), x, is_exact=is_exact)
    assert torch.equal(cpu.linear(packed_of(rows, is_exact=is_exact), x), expected)


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize("name", TYPES)
def test_linear_row_is_the_same_alone_and_in_any_batch(name: str, is_exact: bool, isa: str) -> None:
    rows = random_rows(name, *SHAPES.get(name, ODD_SHAPE))
    packed = packed_of(rows, is_exact=is_exact)
    x = tokens(40, rows.shape[1])
    whole = cpu.linear(packed, x)
    for num_tokens in range(1, 41):
        assert torch.equal(cpu.linear(packed, x[:num_tokens]), whole[:num_tokens])
    alone = torch.cat([cpu.linear(packed, x[m : m + 1]) for m in range(40)])
    assert torch.equal(alone, whole)


@pytest.mark.parametrize("shape", [(37, 768), (100, 256), ODD_SHAPE])
@pytest.mark.parametrize("name", TYPES)
def test_linear_row_is_the_same_in_a_long_prefill(
    name: str, shape: tuple[int, int], isa: str
) -> None:
    # Many tokens take another path: more than one pass, a tile that is not full, a part of a panel.
    if shape == ODD_SHAPE:
        shape = SHAPES.get(name, shape)  # of super-blocks there are only whole ones
    rows = random_rows(name, *shape)
    packed = packed_of(rows, tokens(1, shape[0])[0])
    x = tokens(301, shape[1])
    x[280, 3] = torch.nan
    whole = cpu.linear(packed, x)
    few = torch.cat([cpu.linear(packed, part) for part in x.split(32)])
    assert whole[280].isnan().all()
    assert torch.equal(whole.nan_to_num(7.0), few.nan_to_num(7.0))


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize("dtype", DENSE_DTYPES)
def test_linear_of_dense_weights_is_exact_and_row_invariant(
    dtype: torch.dtype, is_exact: bool, isa: str
) -> None:
    # 117 rows: groups of 16 side by side, single ones, and a part of one.
    weight = (tokens(117, 288, seed=2) * 0.05).to(dtype)
    bias = tokens(1, 117)[0]
    packed = cpu.pack([weight], bias, is_exact=is_exact)
    assert packed is not None
    assert packed.num_bytes == 128 * 288 * weight.element_size()
    x = tokens(45, 288)
    whole = cpu.linear(packed, x)
    is_rounded = isa == "avx512bf16" and dtype == torch.bfloat16 and not is_exact
    rounded = x.bfloat16() if is_rounded else x
    expected = rounded.double() @ weight.double().T + bias.double()
    assert (whole - expected).norm() <= 1e-6 * expected.norm()
    for num_tokens in range(1, 45):
        assert torch.equal(cpu.linear(packed, x[:num_tokens]), whole[:num_tokens])
    assert torch.equal(torch.cat([cpu.linear(packed, row) for row in x.split(1)]), whole)


@pytest.mark.parametrize("dtype", DENSE_DTYPES)
def test_linear_of_dense_weights_takes_rows_that_are_not_adjacent(dtype: torch.dtype) -> None:
    weight = tokens(40, 64).to(dtype)
    every_second, copied = cpu.pack([weight[::2]], None), cpu.pack([weight[::2].contiguous()], None)
    assert every_second is not None
    assert copied is not None
    x = tokens(2, 64)
    assert torch.equal(cpu.linear(every_second, x), cpu.linear(copied, x))


# Matrices end inside of a group of 16, between two groups, after a single row, after none.
HEIGHTS = [16, 5, 1, 0, 30, 32]


@pytest.mark.parametrize("name", TYPES)
def test_quantised_matrices_on_top_of_each_other_are_packed_as_one(name: str) -> None:
    rows = random_rows(name, sum(HEIGHTS), 256)
    parts = [
        Rows(rows.ggml_type, (len(packed), 256), packed.clone())
        for packed in rows.packed.split(HEIGHTS)
    ]
    stacked = cpu.pack(parts, None)
    assert stacked is not None
    x = tokens(3, 256)
    assert torch.equal(cpu.linear(stacked, x), cpu.linear(packed_of(rows), x))


@pytest.mark.parametrize("dtype", DENSE_DTYPES)
def test_dense_matrices_on_top_of_each_other_are_packed_as_one(dtype: torch.dtype) -> None:
    whole = (tokens(sum(HEIGHTS), 96, seed=3) * 0.05).to(dtype)
    parts = [part.clone() for part in whole.split(HEIGHTS)]
    stacked, one = cpu.pack(parts, None), cpu.pack([whole], None)
    assert stacked is not None
    assert one is not None
    x = tokens(3, 96)
    assert torch.equal(cpu.linear(stacked, x), cpu.linear(one, x))


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_linear_does_not_depend_on_the_number_of_threads(num_threads: int) -> None:
    rows = random_rows("Q4_1", 1000, 576)
    packed = packed_of(rows)
    x = tokens(9, 576)
    two = cpu.linear(packed, x)
    cpu.set_num_threads(num_threads)
    assert cpu.num_threads() == num_threads
    assert torch.equal(cpu.linear(packed, x), two)


def test_linear_of_no_tokens_is_empty() -> None:
    packed = packed_of(random_rows("Q8_0", 16, 64))
    assert cpu.linear(packed, torch.empty(0, 64)).shape == (0, 16)


def test_linear_of_zeros_and_of_tiny_values_is_the_bias() -> None:
    bias = torch.arange(16.0)
    packed = packed_of(random_rows("Q4_1", 16, 64), bias)
    x = torch.stack([torch.zeros(64), torch.full((64,), 1e-38)])
    assert torch.equal(cpu.linear(packed, x), bias.expand(2, 16))


@pytest.mark.parametrize("dtype", DENSE_DTYPES)
def test_linear_of_dense_weights_keeps_a_poisoned_token_alone(dtype: torch.dtype, isa: str) -> None:
    packed = cpu.pack([tokens(32, 96).to(dtype)], None)
    assert packed is not None
    x = tokens(3, 96)
    clean = cpu.linear(packed, x)
    x[1, 40] = torch.nan
    out = cpu.linear(packed, x)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_linear_poisoned_token_stays_alone_and_visible(poison: float, isa: str) -> None:
    packed = packed_of(random_rows("Q4_0", 32, 96))
    x = tokens(3, 96)
    clean = cpu.linear(packed, x)
    x[1, 40] = poison
    out = cpu.linear(packed, x)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("is_exact", [True, False])
def test_linear_uses_the_extreme_integers_exactly(is_exact: bool, isa: str) -> None:
    # -128 weights times the largest activations: the largest sums the integer paths can meet.
    rows = random_rows("Q8_0", 16, 64)
    rows.packed.reshape(16, 2, 34)[:, :, 2:] = 0x80
    x = torch.ones(1, 64)
    expected = reference.linear(*exact_parts(rows), x, is_exact=is_exact)
    assert torch.equal(cpu.linear(packed_of(rows, is_exact=is_exact), x), expected)


def test_pack_declines_what_it_has_no_kernel_for() -> None:
    rows = random_rows("Q8_0", 16, 64)
    rows.ggml_type.name = "IQ1_S"
    assert cpu.pack([rows], None) is None
    assert cpu.pack([torch.zeros(16, 40)], None) is None  # columns not in thirty-twos
    assert cpu.pack([torch.zeros(16, 64).double()], None) is None
    assert cpu.pack([random_rows("Q8_0", 16, 64)], None) is not None


def test_pack_reads_rows_that_are_not_adjacent() -> None:
    rows = random_rows("Q4_1", 40, 64)
    x = tokens(2, 64)
    every_second = Rows(rows.ggml_type, (20, 64), rows.packed[::2])
    expected = cpu.linear(packed_of(rows), x)[:, ::2]
    assert torch.equal(cpu.linear(packed_of(every_second), x), expected)
