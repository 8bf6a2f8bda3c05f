"""Matrix products with a weight that is dense, quantised, or in the layout of a device's kernels.

The models call `Linear`; what computes is decided once, when it is built. The reference way is
torch alone: dense `F.linear`, or dequantising slabs of rows into a bounded scratch tensor. Native
kernels are used on the CPU, and Triton's for quantised weights on CUDA, unless the backend is
"reference"; "exact" ones do not round activations to 8 bits or bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import cpu as native
from engine.quant.tensor import QuantizedTensor

Backend = Literal["auto", "triton", "exact", "reference"]
Weight = Tensor | QuantizedTensor

# Scratch for dequantised rows. On the CPU a slab should stay in the second-level cache between
# being written and being read; on a GPU it must be large enough to fill the device.
SLAB_BYTES: Final = {"cpu": 1 << 20, "cuda": 64 << 20}


class Product(Protocol):
    """x (num_tokens, in) → (num_tokens, out), in x's dtype."""

    out_features: int
    num_bytes: int

    def __call__(self, x: Tensor) -> Tensor: ...


class DenseProduct:
    """`F.linear` with a weight (out, in) in the compute dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        self.out_features = weight.shape[0]
        self.num_bytes = weight.numel() * weight.element_size()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class SlabProduct:
    """Dequantise a slab of rows, multiply, go on: the reference for quantised weights."""

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        self.out_features, self._in_features = weight.shape
        self.num_bytes = weight.num_bytes

    def __call__(self, x: Tensor) -> Tensor:
        scratch_bytes = SLAB_BYTES.get(x.device.type, SLAB_BYTES["cpu"])
        # Dequantising works in float32 whatever the result's dtype.
        num_rows = max(1, scratch_bytes // (4 * self._in_features))
        out = x.new_empty(x.shape[0], self.out_features)
        for begin in range(0, self.out_features, num_rows):
            end = min(begin + num_rows, self.out_features)
            slab = self.weight.dequantize(x.dtype, slice(begin, end))
            out[:, begin:end] = F.linear(x, slab)
        return out if self.bias is None else out + self.bias


class NativeProduct:
    """The native CPU kernel; it computes in float32 and holds its own copy of the weight."""

    def __init__(self, packed: native.PackedLinear) -> None:
        self.packed = packed
        self.out_features = packed.out_features
        self.num_bytes = packed.num_bytes

    def __call__(self, x: Tensor) -> Tensor:
        return native.linear(self.packed, x.float().contiguous()).to(x.dtype)


def pack_native(
    weights: Sequence[Weight], bias: Tensor | None, dtype: torch.dtype, backend: Backend
) -> NativeProduct | None:
    """Return weights of one stored type and width, on top of each other, packed as one matrix.

    None when the native CPU kernels do not apply. Dense weights are packed as they are stored, for
    float32 computing only.
    """
    is_wanted = backend in ("auto", "exact") and weights[0].device.type == "cpu"
    if not is_wanted or not native.available():
        return None
    if isinstance(weights[0], Tensor) and dtype != torch.float32:
        return None
    float_bias = None if bias is None else bias.float()
    packed = native.pack(weights, float_bias, is_exact=backend == "exact")
    return None if packed is None else NativeProduct(packed)


class Linear:
    """y = x Wᵀ + b. Several weights side by side are one Linear with concatenated outputs."""

    def __init__(
        self,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        backend: Backend = "auto",
    ) -> None:
        """Take `weight` (out, in) in any float dtype, or quantised; `dtype` is that of x.

        The weight is not kept when the native kernels pack it, so a mapped view may be passed; it
        is kept otherwise, so pass what may live as long as the Linear.
        """
        self.in_features: int = weight.shape[1]
        compute_dtype = dtype or (weight.dtype if isinstance(weight, Tensor) else torch.float32)
        bias = None if bias is None else bias.to(compute_dtype)
        self._products: tuple[Product, ...] = (_product(weight, bias, compute_dtype, backend),)

    @classmethod
    def from_products(cls, products: Sequence[Product], in_features: int) -> Linear:
        """Return the Linear whose output is the products' outputs side by side."""
        linear = cls.__new__(cls)
        linear.in_features = in_features
        linear._products = tuple(products)
        return linear

    @classmethod
    def concatenated(cls, parts: Sequence[Linear]) -> Linear:
        """Return one Linear from several over the same input."""
        widths = {part.in_features for part in parts}
        assert len(widths) == 1, f"parts differ in in_features: {widths}"
        return cls.from_products([p for part in parts for p in part._products], widths.pop())

    def __repr__(self) -> str:
        kinds = "+".join(type(product).__name__ for product in self._products)
        return f"Linear({self.in_features} -> {self.out_features}, {kinds})"

    @property
    def products(self) -> tuple[Product, ...]:
        """What computes the outputs, in their order."""
        return self._products

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return sum(product.out_features for product in self._products)

    @property
    def packed_parts(self) -> list[native.PackedLinear] | None:
        """The parts in the native kernels' layout, in output order; None unless all are."""
        parts = [p.packed for p in self._products if isinstance(p, NativeProduct)]
        return parts if len(parts) == len(self._products) else None

    @property
    def is_native(self) -> bool:
        """Whether a native kernel computes any part."""
        return any(isinstance(product, NativeProduct) for product in self._products)

    @property
    def num_bytes(self) -> int:
        """Bytes of weights held."""
        return sum(product.num_bytes for product in self._products)

    def __call__(self, x: Tensor) -> Tensor:
        """Map x (num_tokens, in_features) to (num_tokens, out_features), in x's dtype."""
        if len(self._products) == 1:
            return self._products[0](x)
        return torch.cat([product(x) for product in self._products], dim=-1)


def _product(weight: Weight, bias: Tensor | None, dtype: torch.dtype, backend: Backend) -> Product:
    packed = pack_native([weight], bias, dtype, backend)
    if packed is not None:
        return packed
    if isinstance(weight, QuantizedTensor):
        return _plane_product(weight, bias, backend) or SlabProduct(weight, bias)
    return DenseProduct(weight.to(dtype), bias)


def has_triton_kernel(weight: Weight, backend: Backend) -> bool:
    """Tell whether a quantised weight is multiplied as it is stored on the Triton kernels."""
    if backend != "triton" or isinstance(weight, Tensor):
        return False
    from engine.kernels.triton.planes import PLANE_TYPES

    return weight.ggml_type in PLANE_TYPES


def _plane_product(
    weight: QuantizedTensor, bias: Tensor | None, backend: Backend
) -> Product | None:
    if not has_triton_kernel(weight, backend):
        return None
    from engine.kernels.triton.planes import split_planes
    from engine.layers.plane_linear import PlaneProduct  # imports Triton

    return PlaneProduct(split_planes(weight), bias)


def stored_bytes(weight: Weight) -> int:
    """Return the bytes a weight takes as it is stored."""
    if isinstance(weight, QuantizedTensor):
        return weight.num_bytes
    return weight.numel() * weight.element_size()
