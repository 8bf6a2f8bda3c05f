"""The operations between the matrix products, one native call each.

All tensors are float32 on the CPU and contiguous; `reference` holds the same functions in torch.
A token's result is bit-identical whatever the other tokens, their number and the threads; how a
sequence was cut into prefill chunks does not show either.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from engine.kernels.cpu import library
from engine.kernels.cpu.structs import AttentionShape, SequenceRow

# The head sizes that attention_kernel.h has code for.
HEAD_DIMS: Final = (16, 32, 64, 80, 96, 128, 256)
# Vectors are read 16 values at a time.
LANES: Final = 16


class QueryRow(Protocol):
    """One sequence's query tokens start..end-1; the last one sees kv_len positions.

    Position p is in slot block_ids[p // block_size] * block_size + p % block_size of the cache, or
    in slot first_slot + p when `block_ids` (int64) is None.
    """

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def kv_len(self) -> int: ...
    @property
    def first_slot(self) -> int: ...
    @property
    def block_ids(self) -> Tensor | None: ...


@dataclass(frozen=True, slots=True)
class AttentionRow:
    """A plain `QueryRow`."""

    start: int
    end: int
    kv_len: int
    first_slot: int = 0
    block_ids: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rotary:
    """Inverse frequencies (rotary_dim / 2,), and the factor on cos and sin."""

    inverse_frequencies: Tensor
    scale: float = 1.0


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension, a multiple of 16."""
    _check(x, weight)
    size = x.shape[-1]
    assert size % LANES == 0, f"rows of {size} values are not in sixteens"
    out = torch.empty_like(x)
    library.load().cortexd_rms_norm(
        x.data_ptr(), weight.data_ptr(), eps, x.numel() // size, size, out.data_ptr()
    )
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up: (num_tokens, 2 * size) to (num_tokens, size), size in sixteens."""
    _check(gate_up)
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    assert size % LANES == 0, f"rows of {size} values are not in sixteens"
    out = torch.empty(num_tokens, size)
    library.load().cortexd_silu_mul(gate_up.data_ptr(), num_tokens, size, out.data_ptr())
    return out


def rope_and_kv_write(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache_layer: Tensor,
    rotary: Rotary,
    *,
    head_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Norm (optional) and rotate Q and K heads in place, copy K and V to the cache.

    qkv (num_tokens, num_heads + 2 * num_kv_heads, head_dim); positions, slots (num_tokens,) int64;
    cache_layer (num_blocks, block_size, 2 * num_kv_heads, head_dim); head_norm
    (num_heads + num_kv_heads, head_dim).
    """
    _check(qkv, cache_layer, rotary.inverse_frequencies, head_norm)
    _check_integers(positions, slots)
    shape = _shape(qkv.shape[1] - cache_layer.shape[2], cache_layer, 0.0)
    done = library.load().cortexd_rope_and_kv_write(
        ctypes.byref(shape),
        qkv.data_ptr(),
        qkv.shape[0],
        positions.data_ptr(),
        rotary.inverse_frequencies.data_ptr(),
        rotary.inverse_frequencies.numel(),
        rotary.scale,
        None if head_norm is None else head_norm.data_ptr(),
        eps,
        slots.data_ptr(),
        cache_layer.data_ptr(),
    )
    _raise_without_memory(done, qkv.shape[0])


def paged_attention(
    query: Tensor, cache_layer: Tensor, rows: Sequence[QueryRow], scale: float
) -> Tensor:
    """Attend each token causally to its sequence's positions, its own included.

    query (num_tokens, num_heads, head_dim), where tokens may be strided (a slice of qkv);
    cache_layer as in `rope_and_kv_write`. Returns (num_tokens, num_heads * head_dim); every token
    belongs to a row.
    """
    _check(cache_layer)
    num_tokens, num_heads, head_dim = query.shape
    assert query.dtype == torch.float32, f"query is {query.dtype}, not float32"
    assert query.stride()[1:] == (head_dim, 1), f"query has strides {query.stride()}"
    assert head_dim in HEAD_DIMS, f"head_dim {head_dim} is none of {HEAD_DIMS}"
    shape = _shape(num_heads, cache_layer, scale)
    out = torch.empty(num_tokens, num_heads * head_dim)
    native_rows = pack_rows(rows)
    done = library.load().cortexd_attend(
        ctypes.byref(shape),
        query.data_ptr(),
        query.stride(0),
        cache_layer.data_ptr(),
        native_rows,
        len(rows),
        out.data_ptr(),
    )
    _raise_without_memory(done, num_tokens)
    return out


def pack_rows(rows: Sequence[QueryRow]) -> ctypes.Array[SequenceRow]:
    """Return the C form; the rows' block_ids must outlive it."""
    native = (SequenceRow * len(rows))()
    for target, row in zip(native, rows, strict=True):
        target.start = row.start
        target.end = row.end
        target.kv_len = row.kv_len
        target.first_slot = row.first_slot
        target.block_ids = None if row.block_ids is None else row.block_ids.data_ptr()
    return native


def _shape(num_heads: int, cache_layer: Tensor, scale: float) -> AttentionShape:
    _, block_size, key_value_heads, head_dim = cache_layer.shape
    return AttentionShape(num_heads, key_value_heads // 2, head_dim, block_size, scale)


def _check(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            assert tensor.dtype == torch.float32, f"{tensor.dtype} instead of float32"
            assert tensor.is_contiguous(), f"strides {tensor.stride()} are not contiguous"


def _check_integers(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.dtype == torch.int64, f"{tensor.dtype} instead of int64"
        assert tensor.is_contiguous(), f"strides {tensor.stride()} are not contiguous"


def _raise_without_memory(done: int, num_tokens: int) -> None:
    if done != 0:
        raise MemoryError(f"no memory for the scratch space of {num_tokens} tokens")
