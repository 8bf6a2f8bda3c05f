"""Weights of one model, from mapped files into the layers, under canonical names.

Plan first, copy second: opening checks every name, shape and type against the architecture's plan
(nothing copied yet); then the model's constructor asks for its layers one by one. Quantised tensors
stay quantised; dense ones take the compute dtype, or are quantised here when the user asked for it.
A tensor is copied (or packed) once, straight from the mapping, so the peak is the model plus one
tensor. Called on every rank, which reads only its own part of each tensor.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from cortexd.log import event
from cortexd.models import ModelFiles, ModelSpec
from engine import device as devices
from engine.formats.checkpoint import Checkpoint
from engine.kernels import cpu as native
from engine.layers.embedding import Embedding, tied_embedding
from engine.layers.linear import Backend, Linear, Weight, has_triton_kernel, pack_native
from engine.layers.sparse_mlp import SparseMLP
from engine.loading.memory_check import check_weights_fit
from engine.loading.stored_tensors import ProgressCallback, RowSelection, StoredRows, StoredTensors
from engine.loading.tensor_views import stack_rows
from engine.quant.tensor import QuantizedTensor
from engine.specs.tensor_plan import HEAD
from engine.tp.comm import Comm
from engine.tp.layers import (
    GatheredHead,
    RowParallelLinear,
    SplitSparseMLP,
    VocabParallelEmbedding,
)
from engine.tp.sharding import makes_partial_sums

Layer = TypeVar("Layer", Linear, Embedding)


class Weights:
    """The checked tensors of a checkpoint, handed out as layers on `device` in `dtype`."""

    def __init__(
        self,
        stored: StoredTensors,
        spec: ModelSpec,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: Backend = "auto",
        comm: Comm | None = None,
    ) -> None:
        """Take the whole model's spec; `comm` says which part of it this rank holds."""
        self._comm = comm or Comm()
        self.dtype = dtype
        self.device = torch.device(device)
        self.backend: Backend = backend
        self.memory_bytes = 0  # of all layers handed out so far
        self.has_native_layers = False  # whether native kernels compute any of them
        self._spec = spec
        self._slab_types: set[str] = set()  # quantised types without a Triton kernel
        self._stored = stored

    @classmethod
    def open(
        cls,
        files: ModelFiles,
        spec: ModelSpec,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: Backend = "auto",
        progress: ProgressCallback | None = None,
        comm: Comm | None = None,
    ) -> Weights:
        """Open the files and check the whole plan; no weight byte is read.

        Raises: BadModelFile listing missing, unexpected or misshapen tensors;
        UnsupportedArchitecture naming tensor types that cannot run.
        """
        comm = comm or Comm()
        checkpoint = Checkpoint.open(files)
        try:
            stored = StoredTensors(
                checkpoint,
                spec,
                comm.shard,
                torch.device(device),
                quant=None if checkpoint.is_gguf else files.quant,
                progress=progress,
            )
        except BaseException:
            checkpoint.close()
            raise
        return cls(stored, spec, device=device, dtype=dtype, backend=backend, comm=comm)

    def check_memory(self) -> None:
        """Raise InsufficientMemory when the device has no room for the weights; none is read."""
        # The CPU's kernels multiply dense weights as they are stored.
        is_wanted = self.backend in ("auto", "exact") and self.device.type == "cpu"
        is_native = is_wanted and native.available()
        check_weights_fit(
            self._stored.planned(),
            None if is_native and self.dtype == torch.float32 else self.dtype.itemsize,
            self._stored.in_situ,
            is_tied=self._spec.tie_word_embeddings,
            available_bytes=devices.free_memory_bytes(self.device, self._comm.world_size),
            device=str(self.device),
        )

    @property
    def total_bytes(self) -> int:
        """Bytes that this rank reads of all tensors of the plan, as stored."""
        return self._stored.total_bytes

    def linear(
        self,
        name: str,
        out_features: int,
        in_features: int,
        bias_name: str | None = None,
        *,
        is_exact: bool = False,
        sums: bool = True,
    ) -> Linear:
        """Return the layer of the matrix `name` (out_features, in_features).

        `is_exact`: never quantised at load. Of a matrix that is split by columns, `in_features` are
        this rank's, and the layer `sums` up what all ranks make, or leaves that to the caller.
        """
        rows = StoredRows(name, out_features, bias_name, is_exact=is_exact)
        if not sums or self._comm.shard.is_whole or not makes_partial_sums(name):
            return self._track(self._linear([rows], in_features))
        if bias_name is not None and self._comm.rank:
            self._stored.take(bias_name)  # rank 0 adds it, once
            rows = replace(rows, bias_name=None)
        return RowParallelLinear(self._track(self._linear([rows], in_features)), self._comm)

    def merged_linear(
        self,
        names: Sequence[str],
        out_features: Sequence[int],
        in_features: int,
        bias_names: Sequence[str | None] | None = None,
        *,
        selections: Sequence[RowSelection] | None = None,
        is_exact: Sequence[bool] | None = None,
    ) -> Linear:
        """Return one layer over several matrices with the same input, outputs concatenated.

        Matrices of one stored type become one matrix; of different types, parts of one layer.
        `selections` says which rows of a stored tensor make the matrix of `out_features` rows, or
        which matrix of a stored stack it is; None: all. `is_exact` parts are never quantised at
        load.
        """
        biases = list(bias_names or [None] * len(names))
        rows = [
            StoredRows(*part)
            for part in zip(
                names,
                out_features,
                biases,
                selections or [None] * len(names),
                is_exact or [False] * len(names),
                strict=True,
            )
        ]
        kinds = {(self._stored.kind(part.name), part.is_exact) for part in rows}
        if len(kinds) == 1 and all((b is None) == (biases[0] is None) for b in biases):
            return self._track(self._linear(rows, in_features))
        parts = [self._linear([part], in_features) for part in rows]
        return self._track(Linear.concatenated(parts))

    def embedding(self, name: str, rows: int, columns: int) -> Embedding:
        """Return the token embedding of the matrix `name` (rows, columns).

        For a tied model its `as_linear()` is the head.
        """
        if self._comm.shard.is_whole:
            return self._embedding(name, rows, columns)
        local = self._embedding(name, self._stored.local(name).shape[0], columns)
        return VocabParallelEmbedding(local, self._comm, rows)

    def _embedding(self, name: str, rows: int, columns: int) -> Embedding:
        mapped = stack_rows(self._stored.matrix(StoredRows(name, rows, is_exact=True), columns))
        embedding = None
        is_tied = self._spec.tie_word_embeddings
        # Rows that are only looked up take no time, so they stay as exact as they are stored.
        head = self._stored.quantized(name, mapped) if is_tied else mapped
        if is_tied and self.device.type == "cpu":
            embedding = tied_embedding(mapped, head, dtype=self.dtype, backend=self.backend)
        if embedding is None:
            # Dense rows are converted on look-up: half the memory of bf16 as float32.
            owned = self._stored.own(head, self.dtype if is_tied else None)
            embedding = self._unpacked_embedding(owned)
        return self._track(embedding)

    def _unpacked_embedding(self, weight: Weight) -> Embedding:
        if isinstance(weight, QuantizedTensor) and has_triton_kernel(weight, self.backend):
            from engine.layers.plane_linear import PlaneEmbedding  # imports Triton

            return PlaneEmbedding(weight, self.dtype)
        return Embedding(weight, dtype=self.dtype)

    def head(self, embedding: Embedding) -> Linear:
        """Return the output head: the embedding's matrix when tied, lm_head otherwise."""
        if self._spec.tie_word_embeddings:
            return embedding.as_linear()
        vocab_size = self._spec.vocab_size
        if self._comm.shard.is_whole:
            return self.linear(HEAD, vocab_size, self._spec.hidden_size)
        local = self.linear(HEAD, self._stored.local(HEAD).shape[0], self._spec.hidden_size)
        return GatheredHead(local, self._comm, vocab_size)

    def summed(self, experts: SparseMLP) -> SparseMLP:
        """Return experts that were built without sums such that all ranks' parts are added up."""
        return experts if self._comm.shard.is_whole else SplitSparseMLP(experts, self._comm)

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a small dense tensor on the device, in `dtype` and of this `shape`."""
        return self.vector(name, math.prod(shape), dtype).view(shape)

    def vector(self, name: str, size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return the vector `name` (size,) on the device, in `dtype` (default: compute dtype)."""
        values = self._stored.numbers(name)
        assert len(values) == size, f"{name}: planned {len(values)} numbers, asked for {size}"
        owned = torch.empty(size, dtype=dtype or self.dtype, device=self.device).copy_(values)
        self.memory_bytes += owned.numel() * owned.element_size()
        return owned

    def rope_factors(self) -> Tensor | None:
        """Return the divisors (head_dim / 2,) float32 of the rope frequencies, where given."""
        return self._stored.rope_factors()

    def check_all_used(self) -> None:
        """Check that the model asked for every planned tensor; a fault here is the model's.

        Logs which matrices could not be quantised as the user wanted, and which types no kernel
        of the chosen backend multiplies.
        """
        self._stored.check_all_used()
        if self._slab_types:
            event(
                logging.getLogger("cortexd.engine"),
                "weights.without_kernel",
                logging.WARNING,
                types=sorted(self._slab_types),
                consequence="dequantised slab by slab in torch, which is slower",
            )

    def close(self) -> None:
        """Let go of the files. Layers stay valid; mapped pages leave this process."""
        self._stored.close()

    def _linear(self, rows: Sequence[StoredRows], in_features: int) -> Linear:
        pieces = [piece for part in rows for piece in self._stored.matrix(part, in_features)]
        biases = [self._bias(part) for part in rows if part.bias_name is not None]
        bias = torch.cat(biases) if biases else None
        packed = None
        if self.device.type == "cpu":
            packed = pack_native(pieces, bias, self.dtype, self.backend)
        if packed is not None:
            return Linear.from_products([packed], in_features)
        weight = stack_rows(pieces)
        owned = (
            weight
            if len(pieces) > 1 and self._is_in_place(weight)
            else self._stored.own(weight, self.dtype)
        )
        return self._unpacked_linear(owned, bias)

    def _unpacked_linear(self, weight: Weight, bias: Tensor | None) -> Linear:
        """Return the layer of a weight that the CPU kernels do not take."""
        if self.backend != "triton":
            return Linear(weight, bias, dtype=self.dtype, backend="reference")
        if isinstance(weight, QuantizedTensor) and not has_triton_kernel(weight, self.backend):
            self._slab_types.add(weight.ggml_type.name)
        return Linear(weight, bias, dtype=self.dtype, backend="triton")

    def _bias(self, part: StoredRows) -> Tensor:
        assert part.bias_name is not None, f"{part.name} has no bias"
        if part.selection is None:
            return self.vector(part.bias_name, part.num_rows)
        stored = self._stored.take(part.bias_name)
        return self.vector(part.bias_name, stored.num_elements)[part.selection]

    def _is_in_place(self, weight: Weight) -> bool:
        """Tell whether a freshly made weight needs neither a move nor a conversion."""
        if weight.device != self.device:
            return False
        return isinstance(weight, QuantizedTensor) or weight.dtype == self.dtype

    def _track(self, layer: Layer) -> Layer:
        self.memory_bytes += layer.num_bytes
        self.has_native_layers |= layer.is_native
        return layer
