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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from cortexd.errors import BadModelFile
from cortexd.log import event
from cortexd.models import ModelFiles, ModelSpec
from engine import device as devices
from engine.formats.checkpoint import Checkpoint, CheckpointTensor, listing
from engine.formats.checkpoint_check import check_plan
from engine.formats.in_situ import in_situ_type, type_for_columns
from engine.kernels import cpu as native
from engine.layers.embedding import Embedding, tied_embedding
from engine.layers.linear import Backend, Linear, Weight, has_triton_kernel, pack_native
from engine.layers.sparse_mlp import SparseMLP
from engine.memory_check import check_weights_fit
from engine.models.registry import REGISTRY
from engine.quant.quantize import quantize_rows
from engine.quant.tensor import QuantizedTensor
from engine.tensor_plan import HEAD
from engine.tensor_views import TORCH_DTYPES, bytes_view, dense_view, stack_rows
from engine.tp.comm import Comm
from engine.tp.layers import (
    GatheredHead,
    RowParallelLinear,
    SplitSparseMLP,
    VocabParallelEmbedding,
)
from engine.tp.sharding import makes_partial_sums

Layer = TypeVar("Layer", Linear, Embedding)
RowSelection = Tensor | int | None  # int64 row ids, one matrix of a stack, or all rows
ProgressCallback = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows of a stored tensor that are a matrix of their own, in this order."""

    name: str
    num_rows: int
    bias_name: str | None = None
    selection: RowSelection = None
    is_exact: bool = False


class Weights:
    """The checked tensors of a checkpoint, handed out as layers on `device` in `dtype`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: Backend = "auto",
        progress: ProgressCallback | None = None,
        quant: str | None = None,
        comm: Comm | None = None,
    ) -> None:
        """Take the whole model's spec; `comm` says which part of it this rank holds.

        `quant` is what dense matrices are quantised to while they are loaded.
        """
        entry = REGISTRY[spec.model_type]
        plan = entry.plan(spec)
        check_plan(checkpoint, plan, spec)
        self._comm = comm or Comm()
        self.dtype = dtype
        self.device = torch.device(device)
        self.backend: Backend = backend
        self.memory_bytes = 0  # of all layers handed out so far
        self.has_native_layers = False  # whether native kernels compute any of them
        self._checkpoint = checkpoint
        self._spec = spec
        local = self._comm.shard.local_spec(spec)
        self._in_situ = None if quant is None else in_situ_type(quant)
        self._kept_dense: list[str] = []
        self._slab_types: set[str] = set()  # quantised types without a Triton kernel
        self._checked = plan.required
        self._unused = dict.fromkeys(plan.required)
        self._permuted_heads = (
            {"q_proj": local.num_attention_heads, "k_proj": local.num_key_value_heads}
            if checkpoint.is_gguf and entry.has_permuted_rope_rows
            else {}
        )
        self._progress = progress
        self._done_bytes = 0
        self._total_bytes = sum(self._local(name).num_bytes for name in plan.required)

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
        checkpoint = Checkpoint.open(files)
        try:
            return cls(
                checkpoint,
                spec,
                device=device,
                dtype=dtype,
                backend=backend,
                progress=progress,
                quant=None if checkpoint.is_gguf else files.quant,
                comm=comm,
            )
        except BaseException:
            checkpoint.close()
            raise

    def check_memory(self) -> None:
        """Raise InsufficientMemory when the device has no room for the weights; none is read."""
        # The CPU's kernels multiply dense weights as they are stored.
        is_wanted = self.backend in ("auto", "exact") and self.device.type == "cpu"
        is_native = is_wanted and native.available()
        check_weights_fit(
            {name: self._local(name) for name in self._checked},
            None if is_native and self.dtype == torch.float32 else self.dtype.itemsize,
            self._in_situ,
            is_tied=self._spec.tie_word_embeddings,
            available_bytes=devices.free_memory_bytes(self.device, self._comm.world_size),
            device=str(self.device),
        )

    @property
    def total_bytes(self) -> int:
        """Bytes that this rank reads of all tensors of the plan, as stored."""
        return self._total_bytes

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
            self._take(bias_name)  # rank 0 adds it, once
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
        kinds = {(self._checkpoint[part.name].ggml_type, part.is_exact) for part in rows}
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
        local = self._embedding(name, self._local(name).shape[0], columns)
        return VocabParallelEmbedding(local, self._comm, rows)

    def _embedding(self, name: str, rows: int, columns: int) -> Embedding:
        mapped = self._matrix(StoredRows(name, rows, is_exact=True), columns)
        embedding = None
        is_tied = self._spec.tie_word_embeddings
        # Rows that are only looked up take no time, so they stay as exact as they are stored.
        head = self._quantized(name, mapped) if is_tied else mapped
        if is_tied and self.device.type == "cpu":
            embedding = tied_embedding(mapped, head, dtype=self.dtype, backend=self.backend)
        if embedding is None:
            # Dense rows are converted on look-up: half the memory of bf16 as float32.
            owned = self._own(head, self.dtype if is_tied else None)
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
        local = self.linear(HEAD, self._local(HEAD).shape[0], self._spec.hidden_size)
        return GatheredHead(local, self._comm, vocab_size)

    def summed(self, experts: SparseMLP) -> SparseMLP:
        """Return experts that were built without sums such that all ranks' parts are added up."""
        return experts if self._comm.shard.is_whole else SplitSparseMLP(experts, self._comm)

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a small dense tensor on the device, in `dtype` and of this `shape`."""
        return self.vector(name, math.prod(shape), dtype).view(shape)

    def vector(self, name: str, size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return the vector `name` (size,) on the device, in `dtype` (default: compute dtype)."""
        tensor = self._take(name)
        assert tensor.num_elements == size, f"{name}: planned {tensor.shape}, asked for ({size},)"
        values = self._unpermuted(name, dense_view(tensor)).view(size)
        owned = torch.empty(size, dtype=dtype or self.dtype, device=self.device).copy_(values)
        self.memory_bytes += owned.numel() * owned.element_size()
        return owned

    def rope_factors(self) -> Tensor | None:
        """Return the divisors (head_dim / 2,) float32 of the rope frequencies, where given.

        Only GGUF files of models with llama3 rope scaling carry them; the spec's own rope type is
        then "default". Raises: BadModelFile when one is not positive and finite.
        """
        tensor = self._checkpoint.rope_factors
        if tensor is None:
            return None
        factors = dense_view(tensor).to(torch.float32, copy=True)
        if not bool((torch.isfinite(factors) & (factors > 0)).all()):
            raise BadModelFile(f"{tensor.file.path}: {tensor.name} must be positive and finite")
        return factors.to(self.device)

    def check_all_used(self) -> None:
        """Check that the model asked for every planned tensor; a fault here is the model's.

        Logs which matrices could not be quantised as the user wanted, and which types no kernel
        of the chosen backend multiplies.
        """
        assert not self._unused, f"never asked for: {list(self._unused)[:10]}"
        if self._in_situ is not None and self._kept_dense:
            event(
                logging.getLogger("cortexd.engine"),
                "weights.kept_dense",
                logging.WARNING,
                quant=self._in_situ.name,
                reason="rows are no multiple of 32",
                tensors=listing("tensor", sorted(set(self._kept_dense))),
            )

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
        self._checkpoint.release_pages()
        self._checkpoint.close()

    def _linear(self, rows: Sequence[StoredRows], in_features: int) -> Linear:
        matrices = [self._matrix(part, in_features) for part in rows]
        biases = [self._bias(part) for part in rows if part.bias_name is not None]
        bias = torch.cat(biases) if biases else None
        weight = stack_rows(matrices)
        packed = None
        if self.device.type == "cpu":
            packed = pack_native(weight, bias, self.dtype, self.backend)
        if packed is not None:
            return Linear.from_products([packed], in_features)
        owned = (
            weight
            if len(matrices) > 1 and self._is_in_place(weight)
            else self._own(weight, self.dtype)
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
        stored = self._take(part.bias_name)
        return self.vector(part.bias_name, stored.num_elements)[part.selection]

    def _take(self, name: str) -> CheckpointTensor:
        """Return this rank's part of the planned tensor, count it as used, report progress."""
        assert name in self._checked, f"{name} is not in the plan of {self._spec.model_type}"
        tensor = self._local(name)
        if self._unused.pop(name, False) is None:
            self._done_bytes += tensor.num_bytes
            if self._progress is not None:
                self._progress(self._done_bytes, self._total_bytes)
        return tensor

    def _local(self, name: str) -> CheckpointTensor:
        """Return this rank's part of a tensor."""
        tensor = self._checkpoint[name]
        part = self._comm.shard.part(name, tensor.shape, self._spec)
        return tensor if part is None else tensor.part(part)

    def _matrix(self, part: StoredRows, columns: int) -> Weight:
        """Return the matrix as stored: a view of the mapping, except for rows in a new order."""
        tensor = self._take(part.name)
        assert tensor.shape[-1] == columns, f"{part.name}: planned {tensor.shape}, not {columns}"
        view = dense_view if tensor.ggml_type in TORCH_DTYPES else bytes_view
        if isinstance(part.selection, int):
            rows = view(tensor, part.selection)
        else:
            # GGUF files drop the first dimension of a single row.
            rows = torch.atleast_2d(self._unpermuted(part.name, view(tensor)))
            if part.selection is not None:
                rows = rows[part.selection]
        assert len(rows) == part.num_rows, f"{part.name}: {len(rows)} rows, not {part.num_rows}"
        if tensor.ggml_type in TORCH_DTYPES:
            return rows if part.is_exact else self._quantized(part.name, rows)
        assert tensor.ggml_type is not None, f"{part.name}: {tensor.type_name} passed the plan"
        return QuantizedTensor(tensor.ggml_type, (part.num_rows, columns), rows)

    def _unpermuted(self, name: str, rows: Tensor) -> Tensor:
        """Undo the GGUF converter's reordering of query and key rows (llama only).

        It stores row (half s, index j) of each head at 2j + s; whole rows move, so packed rows
        are as good as numbers.
        """
        num_heads = self._permuted_heads.get(name.split(".")[-2])
        if num_heads is None:
            return rows
        pairs = rows.view(num_heads, self._spec.head_dim // 2, 2, -1)
        return pairs.transpose(1, 2).reshape(rows.shape)

    def _quantized(self, name: str, weight: Weight) -> Weight:
        """Return a dense matrix quantised on the device, if the model is to be and its rows fit."""
        if self._in_situ is None or isinstance(weight, QuantizedTensor):
            return weight
        ggml_type = type_for_columns(self._in_situ, weight.shape[1])
        if ggml_type is None:
            self._kept_dense.append(name)
            return weight
        rows = weight.to(self.device)
        if not bool(torch.isfinite(rows).all()):
            path = self._checkpoint[name].file.path
            raise BadModelFile(f"{path}: tensor {name} holds NaN or infinity; cannot be quantised")
        return quantize_rows(rows, ggml_type)

    def _own(self, weight: Weight, dtype: torch.dtype | None) -> Weight:
        """Return a copy on the device: quantised as it is, dense in `dtype` (None: as stored)."""
        if self._in_situ is not None and isinstance(weight, QuantizedTensor):
            return weight  # made here, and on the device
        if isinstance(weight, QuantizedTensor):
            packed = weight.packed.to(self.device, copy=True)
            return QuantizedTensor(weight.ggml_type, weight.shape, packed)
        return weight.to(self.device, dtype or weight.dtype, copy=True)

    def _is_in_place(self, weight: Weight) -> bool:
        """Tell whether a freshly made weight needs neither a move nor a conversion."""
        if weight.device != self.device:
            return False
        return isinstance(weight, QuantizedTensor) or weight.dtype == self.dtype

    def _track(self, layer: Layer) -> Layer:
        self.memory_bytes += layer.num_bytes
        self.has_native_layers |= layer.is_native
        return layer
