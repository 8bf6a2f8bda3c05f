"""Compile every kernel for a GPU that need not be there: `python -m ... CAPABILITY DTYPE`.

Calls the wrappers on CPU tensors of real models' shapes with launches replaced by compilation, and
prints each kernel's name and shared memory. A process of its own: it must not interpret.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel
from triton.runtime.jit import JITFunction, create_function_from_signature

from engine.formats.ggml import GGMLType
from engine.kernels.triton.activation import sigmoid_mul_, silu_mul
from engine.kernels.triton.attention_decode import attend_decode
from engine.kernels.triton.attention_prefill import attend_prefill
from engine.kernels.triton.delta_conv import convolve
from engine.kernels.triton.delta_decode import delta_decode
from engine.kernels.triton.delta_heads import DeltaShape, HeadInputs, HeadWeights, SlotStates
from engine.kernels.triton.delta_prefill import delta_prefill
from engine.kernels.triton.experts import group_pairs, join_pairs, multiply_pairs
from engine.kernels.triton.norm import add_rms_norm
from engine.kernels.triton.planes import PLANE_TYPES, dense_plane, split_planes
from engine.kernels.triton.quant_linear import MAX_TOKENS, dequantize_rows, multiply
from engine.kernels.triton.rope import norm_rotate_write
from engine.kernels.triton.sampling import draw
from engine.quant.tensor import QuantizedTensor

NUM_HEADS, NUM_KV_HEADS, HIDDEN = 32, 8, 4096


class Compiler:
    """Takes the place of a kernel's launch."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.backend = CUDABackend(self.target)
        self.done: set[str] = set()

    def launch(self, kernel: Any, *args: Any, **options: Any) -> None:
        """Compile `kernel` for these arguments, once for each kind of them."""
        options["debug"] = False
        bind = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        bound, specialization, parsed = bind(*args, **options)
        key = f"{kernel.__name__} {specialization} {options}"
        if key in self.done:
            return
        self.done.add(key)
        parsed, signature, constants, attributes = kernel._pack_args(
            self.backend, options, bound, specialization, parsed
        )
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = compile_kernel(source, target=self.target, options=parsed.__dict__)
        print(kernel.__name__, compiled.metadata.shared, flush=True)


def integers(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int64)


def run_dense(dtype: torch.dtype) -> None:
    """Launch what a dense model's step launches."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype)

    for head_dim in (64, 128, 256):
        query, cache = zeros(40, NUM_HEADS, head_dim), zeros(4, 32, 2 * NUM_KV_HEADS, head_dim)
        tables, lens, starts = integers(4, 8), integers(4), integers(5)
        attend_decode(query[:4], cache, tables, lens, scale=1.0, num_splits=4)
        attend_prefill(query, cache, tables, lens, starts, 100, scale=1.0)
        heads = zeros(4, NUM_HEADS + 2 * NUM_KV_HEADS, head_dim)
        rotary = (zeros(4, 1, 64), zeros(4, 1, 64))
        norm = zeros(NUM_HEADS + NUM_KV_HEADS, head_dim)
        for weight in (None, norm, norm.float()):
            norm_rotate_write(heads, cache.flatten(0, 1), lens, rotary, weight, 1e-6)
    hidden = zeros(4, HIDDEN)
    add_rms_norm(hidden.clone(), hidden, hidden[0].clone(), 1e-6)
    add_rms_norm(None, hidden, hidden[0].float(), 1e-6)
    silu_mul(zeros(4, 2 * HIDDEN))
    sigmoid_mul_(hidden, zeros(4, HIDDEN))


def run_hybrid(dtype: torch.dtype) -> None:
    """Launch what a Gated DeltaNet of the 27B's shape launches."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype)

    for has_tiled_heads in (False, True):
        shape = DeltaShape(16, 48, 128, 128, has_tiled_heads)
        mixed, fresh = zeros(40, 80 * 128), torch.zeros(4, dtype=torch.bool)
        tails, weight = zeros(9, 3, 80 * 128), torch.zeros(4, 80 * 128)
        convolve(mixed, tails, weight, integers(4), fresh, integers(5), 50, out=mixed.clone())
        inputs = HeadInputs(mixed, zeros(40, 48), zeros(40, 48), zeros(40, 48 * 128))
        weights = HeadWeights(torch.zeros(48), torch.zeros(48), zeros(128), 1e-6)
        states = SlotStates(torch.zeros(9, 48, 128, 128), integers(4), fresh)
        out = zeros(40, 48 * 128)
        delta_decode(inputs, weights, states, shape, out=out)
        delta_prefill(inputs, weights, states, shape, integers(5), integers(2, 3), out=out)


def run_quantised(dtype: torch.dtype) -> None:
    """Launch the products of every type with few and many tokens, and the look-up."""
    for ggml_type in sorted(PLANE_TYPES):
        packed = torch.zeros(256, ggml_type.row_bytes(HIDDEN), dtype=torch.uint8)
        planes = split_planes(QuantizedTensor(ggml_type, (256, HIDDEN), packed))
        for num_tokens in (1, 8, MAX_TOKENS):
            multiply(torch.zeros(num_tokens, HIDDEN, dtype=dtype), planes)
        dequantize_rows(planes, dtype, (0, 10))
        dequantize_rows(planes, dtype, integers(4))


def run_experts(dtype: torch.dtype) -> None:
    """Launch the steps of 128 experts: alone, few and many tokens; dense and quantised."""
    packed = torch.zeros(128 * 2, GGMLType.Q4_K.row_bytes(HIDDEN), dtype=torch.uint8)
    quantised = QuantizedTensor(GGMLType.Q4_K, (128 * 2, HIDDEN), packed)
    for num_tokens in (1, 16, 2048):
        tiles = group_pairs(integers(num_tokens, 8), 128)
        for matrix in (
            dense_plane(torch.zeros(128 * 2, HIDDEN, dtype=dtype)),
            split_planes(quantised),
        ):
            out = torch.zeros(num_tokens * 8, 2, dtype=dtype)
            for x in (out.new_zeros(num_tokens, HIDDEN), out.new_zeros(len(out), HIDDEN)):
                multiply_pairs(x, matrix, tiles, 128, out)
        join_pairs(out, out.new_zeros(num_tokens, 8))
    group_pairs(integers(2048, 10), 512)


def run_sampler() -> None:
    """Launch the draw."""
    numbers = torch.zeros(4)
    draw(
        torch.zeros(4, 151936),
        (torch.zeros(4, 1024), integers(4, 1024)),
        integers(4),
        temperatures=numbers,
        top_ks=integers(4),
        top_ps=numbers,
        min_ps=numbers,
        seeds=integers(4),
        positions=integers(4),
    )


def main() -> None:
    """Compile all kernels for the capability and dtype of the command line."""
    compiler = Compiler(int(sys.argv[1]))
    dtype = getattr(torch, sys.argv[2])

    def item(kernel: Any, grid: Any) -> Any:
        return lambda *args, **options: compiler.launch(kernel, *args, **options)

    JITFunction.__getitem__ = item
    run_dense(dtype)
    run_quantised(dtype)
    run_experts(dtype)
    run_sampler()
    run_hybrid(dtype)


if __name__ == "__main__":
    main()
