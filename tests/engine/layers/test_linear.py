"""Linear and Embedding: every weight type and backend against plain float32 arithmetic."""

from __future__ import annotations

import gc
import weakref

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.formats.ggml import QUANTIZED_TYPES, GGMLType
from engine.kernels import cpu as native
from engine.layers import linear as linear_module
from engine.layers.embedding import Embedding
from engine.layers.linear import Backend, Linear
from engine.quant.tensor import QuantizedTensor
from tests.engine.model_files import random_blocks

ROWS, COLUMNS = 40, 256
BACKENDS: list[Backend] = ["reference", "exact", "auto"]
# Of the largest output; "auto" rounds activations to 8 bits.
TOLERANCES: dict[Backend, float] = {"reference": 5e-5, "exact": 5e-5, "auto": 1.5e-2}


def _quantized(ggml_type: GGMLType, rows: int = ROWS) -> QuantizedTensor:
    rng = np.random.default_rng(ggml_type)
    packed = random_blocks(rng, gguf.GGMLQuantizationType(ggml_type), rows, COLUMNS)
    return QuantizedTensor(ggml_type, (rows, COLUMNS), torch.from_numpy(packed))


def _assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 5e-5) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ggml_type", sorted(QUANTIZED_TYPES), ids=lambda t: t.name)
def test_linear_quantised_multiplies_by_the_dequantised_weight(
    ggml_type: GGMLType, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All types, several slabs, with a bias, whatever computes it."""
    monkeypatch.setitem(linear_module.SLAB_BYTES, "cpu", 7 * COLUMNS * 4)
    weight = _quantized(ggml_type)
    bias, x = torch.randn(ROWS), torch.randn(5, COLUMNS)
    layer = Linear(weight, bias, backend=backend)
    expected = F.linear(x, weight.dequantize(torch.float32), bias)
    _assert_close(layer(x), expected, TOLERANCES[backend])
    assert (layer.in_features, layer.out_features) == (COLUMNS, ROWS)
    assert layer(x[:0]).shape == (0, ROWS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_answers_in_the_dtype_of_its_input(backend: Backend) -> None:
    """A bfloat16 activation gives a bfloat16 result, also through float32 kernels."""
    weight = _quantized(GGMLType.Q8_0)
    x = torch.randn(3, COLUMNS).bfloat16()
    out = Linear(weight, dtype=torch.bfloat16, backend=backend)(x)
    expected = F.linear(x.float(), weight.dequantize(torch.float32))
    assert out.dtype == torch.bfloat16
    _assert_close(out.float(), expected, tolerance=0.02)


def test_linear_takes_strided_input() -> None:
    """A slice of a wider activation is as good as a contiguous one."""
    weight = _quantized(GGMLType.Q4_0)
    wide = torch.randn(4, 2 * COLUMNS)
    for backend in BACKENDS:
        layer = Linear(weight, backend=backend)
        half = wide[:, COLUMNS:]
        assert torch.equal(layer(half), layer(half.contiguous()))


def test_linear_dense_converts_to_the_compute_dtype() -> None:
    """A bfloat16 weight under float32 computing gives float32 products."""
    weight = torch.randn(ROWS, COLUMNS).bfloat16()
    x, bias = torch.randn(3, COLUMNS), torch.randn(ROWS)
    layer = Linear(weight, bias, dtype=torch.float32, backend="reference")
    assert torch.equal(layer(x), F.linear(x, weight.float(), bias))


def test_concatenated_places_outputs_side_by_side() -> None:
    """Parts of different types are one layer."""
    parts = [
        Linear(torch.randn(3, COLUMNS)),
        Linear(_quantized(GGMLType.Q6_K, 5), backend="reference"),
    ]
    x = torch.randn(2, COLUMNS)
    joined = Linear.concatenated(parts)
    assert torch.equal(joined(x), torch.cat([part(x) for part in parts], dim=-1))
    assert joined.out_features == 8
    assert joined.num_bytes == sum(part.num_bytes for part in parts)


def test_backend_reference_never_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle stays torch alone."""

    def refuse(*_: object) -> None:
        raise AssertionError("packed")

    monkeypatch.setattr(native, "pack", refuse)
    Linear(_quantized(GGMLType.Q4_0), backend="reference")


def test_backend_auto_packs_where_there_are_kernels() -> None:
    """Native kernels are used when this machine has them, the reference otherwise."""
    expected = "NativeProduct" if native.available() else "SlabProduct"
    assert expected in repr(Linear(_quantized(GGMLType.Q4_0), backend="auto"))


def test_backend_auto_lets_go_of_a_packed_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that was packed is not held a second time."""

    class Packed:
        out_features, num_bytes = ROWS, 1

    monkeypatch.setattr(native, "available", lambda: True)
    monkeypatch.setattr(native, "pack", lambda weights, bias, is_exact: Packed())
    weight = _quantized(GGMLType.Q4_0)
    original = weakref.ref(weight.packed)
    layer = Linear(weight, backend="auto")
    del weight
    gc.collect()
    assert original() is None
    assert layer.num_bytes == 1


@pytest.mark.parametrize("ggml_type", [GGMLType.Q8_0, GGMLType.Q6_K], ids=lambda t: t.name)
def test_embedding_quantised_dequantises_the_rows_asked_for(ggml_type: GGMLType) -> None:
    """Rows are exact, repeats and order included; the tied head multiplies by all of them."""
    weight = _quantized(ggml_type)
    whole = weight.dequantize(torch.float32)
    embedding = Embedding(weight, dtype=torch.float32)
    ids = torch.tensor([3, 39, 3])
    assert torch.equal(embedding(ids), whole[ids])
    x = torch.randn(2, COLUMNS)
    _assert_close(embedding.as_linear()(x), F.linear(x, whole))


def test_embedding_dense_converts_rows() -> None:
    """Rows of a bfloat16 matrix come in the compute dtype."""
    weight = torch.randn(ROWS, COLUMNS).bfloat16()
    ids = torch.tensor([0, 7])
    assert torch.equal(Embedding(weight, dtype=torch.float32)(ids), weight[ids].float())


@pytest.mark.gpu
@pytest.mark.parametrize("ggml_type", sorted(QUANTIZED_TYPES), ids=lambda t: t.name)
def test_linear_on_cuda_equals_the_cpu_reference(ggml_type: GGMLType) -> None:
    """The device computes the same products."""
    weight = _quantized(ggml_type)
    x = torch.randn(5, COLUMNS)
    expected = F.linear(x, weight.dequantize(torch.float32))
    out = Linear(weight.to("cuda"))(x.cuda())
    _assert_close(out.cpu(), expected)
