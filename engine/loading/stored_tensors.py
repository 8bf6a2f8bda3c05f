"""The stored tensors of one model as a rank sees them: checked, cut to its part, counted.

Opening checks every name, shape and type against the architecture's plan; nothing is copied before
a layer asks for it. What is handed out is a view of the mapped file wherever it can be.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cortexd.errors import BadModelFile
from cortexd.log import event
from cortexd.models import ModelSpec
from engine.formats.checkpoint import Checkpoint, CheckpointTensor, listing
from engine.formats.checkpoint_check import check_plan
from engine.formats.in_situ import in_situ_type, type_for_columns
from engine.layers.linear import Weight
from engine.loading.tensor_views import TORCH_DTYPES, bytes_view, dense_view
from engine.models.registry import REGISTRY
from engine.quant.quantize import quantize_rows
from engine.quant.tensor import QuantizedTensor
from engine.tp.sharding import Shard

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


class StoredTensors:
    """The planned tensors of a checkpoint; `shard` says which part of each this rank takes."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        shard: Shard,
        device: torch.device,
        *,
        quant: str | None = None,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Check the plan; `quant` is what dense matrices are quantised to while they are read.

        Raises: BadModelFile, UnsupportedArchitecture.
        """
        entry = REGISTRY[spec.model_type]
        plan = entry.plan(spec)
        check_plan(checkpoint, plan, spec)
        self.in_situ = None if quant is None else in_situ_type(quant)
        self._checkpoint = checkpoint
        self._spec = spec
        self._shard = shard
        self._device = device
        self._kept_dense: list[str] = []
        self._checked = plan.required
        self._unused = dict.fromkeys(plan.required)
        local = shard.local_spec(spec)
        self._permuted_heads = (
            {"q_proj": local.num_attention_heads, "k_proj": local.num_key_value_heads}
            if checkpoint.is_gguf and entry.has_permuted_rope_rows
            else {}
        )
        self._progress = progress
        self._done_bytes = 0
        self.total_bytes = sum(tensor.num_bytes for tensor in self.planned().values())

    def __repr__(self) -> str:
        return f"StoredTensors({self._spec.model_type}, {len(self._unused)} not yet asked for)"

    def planned(self) -> dict[str, CheckpointTensor]:
        """Return this rank's part of every planned tensor, by name; none is read."""
        return {name: self.local(name) for name in self._checked}

    def kind(self, name: str) -> object:
        """Return the stored type; matrices of one type can be stacked."""
        return self._checkpoint[name].ggml_type

    def take(self, name: str) -> CheckpointTensor:
        """Return this rank's part of the planned tensor, count it as used, report progress."""
        assert name in self._checked, f"{name} is not in the plan of {self._spec.model_type}"
        tensor = self.local(name)
        if self._unused.pop(name, False) is None:
            self._done_bytes += tensor.num_bytes
            if self._progress is not None:
                self._progress(self._done_bytes, self.total_bytes)
        return tensor

    def local(self, name: str) -> CheckpointTensor:
        """Return this rank's part of a tensor."""
        tensor = self._checkpoint[name]
        part = self._shard.part(name, tensor.shape, self._spec)
        return tensor if part is None else tensor.part(part)

    def matrix(self, part: StoredRows, columns: int) -> list[Weight]:
        """Return the matrix as stored, as pieces that belong on top of each other.

        They are views of the mapping, except for rows that are selected or quantised here.
        """
        tensor = self.take(part.name)
        assert tensor.shape[-1] == columns, f"{part.name}: planned {tensor.shape}, not {columns}"
        view = dense_view if tensor.ggml_type in TORCH_DTYPES else bytes_view
        if isinstance(part.selection, int):
            pieces = [view(tensor, part.selection)]
        else:
            # GGUF files drop the first dimension of a single row.
            rows = torch.atleast_2d(view(tensor))
            pieces = self._unpermuted(part.name, rows)
            if part.selection is not None:
                pieces = [_joined(pieces)[part.selection]]
        num_rows = sum(len(piece) for piece in pieces)
        assert num_rows == part.num_rows, f"{part.name}: {num_rows} rows, not {part.num_rows}"
        if tensor.ggml_type in TORCH_DTYPES:
            return [
                piece if part.is_exact else self.quantized(part.name, piece) for piece in pieces
            ]
        ggml_type = tensor.ggml_type
        assert ggml_type is not None, f"{part.name}: {tensor.type_name} passed the plan"
        return [QuantizedTensor(ggml_type, (len(piece), columns), piece) for piece in pieces]

    def numbers(self, name: str) -> Tensor:
        """Return a vector's stored numbers (size,), in the order of the layers' rows."""
        return _joined(self._unpermuted(name, dense_view(self.take(name)))).view(-1)

    def _unpermuted(self, name: str, rows: Tensor) -> list[Tensor]:
        """Undo the GGUF converter's reordering of query and key rows (llama only).

        It stores row (half s, index j) of each head at 2j + s; whole rows move, so packed rows
        are as good as numbers. The pieces are the halves of all heads, where they are.
        """
        num_heads = self._permuted_heads.get(name.split(".")[-2])
        if num_heads is None:
            return [rows]
        pairs = rows.view(num_heads, self._spec.head_dim // 2, 2, -1)
        return [half for head in pairs.transpose(1, 2) for half in head]

    def quantized(self, name: str, weight: Weight) -> Weight:
        """Return a dense matrix quantised on the device, if the model is to be and its rows fit."""
        if self.in_situ is None or isinstance(weight, QuantizedTensor):
            return weight
        ggml_type = type_for_columns(self.in_situ, weight.shape[1])
        if ggml_type is None:
            self._kept_dense.append(name)
            return weight
        rows = weight.to(self._device)
        if not bool(torch.isfinite(rows).all()):
            path = self._checkpoint[name].file.path
            raise BadModelFile(f"{path}: tensor {name} holds NaN or infinity; cannot be quantised")
        return quantize_rows(rows, ggml_type)

    def own(self, weight: Weight, dtype: torch.dtype | None) -> Weight:
        """Return a copy on the device: quantised as it is, dense in `dtype` (None: as stored)."""
        if self.in_situ is not None and isinstance(weight, QuantizedTensor):
            return weight  # made here, and on the device
        if isinstance(weight, QuantizedTensor):
            packed = weight.packed.to(self._device, copy=True)
            return QuantizedTensor(weight.ggml_type, weight.shape, packed)
        return weight.to(self._device, dtype or weight.dtype, copy=True)

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
        return factors.to(self._device)

    def check_all_used(self) -> None:
        """Check that every planned tensor was asked for; a fault here is the model's.

        Logs which matrices could not be quantised as the user wanted.
        """
        assert not self._unused, f"never asked for: {list(self._unused)[:10]}"
        if self._kept_dense and self.in_situ is not None:
            event(
                logging.getLogger("cortexd.engine"),
                "weights.kept_dense",
                logging.WARNING,
                quant=self.in_situ.name,
                reason="rows are no multiple of 32",
                tensors=listing("tensor", sorted(set(self._kept_dense))),
            )

    def close(self) -> None:
        """Let go of the files; mapped pages leave this process."""
        self._checkpoint.release_pages()
        self._checkpoint.close()


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
