"""What a rank really reads and holds while it loads, against its plan."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from cortexd.models import ModelFiles, ModelSpec
from engine.formats.checkpoint import Checkpoint
from engine.loading.loader import Weights
from engine.loading.stored_tensors import StoredTensors
from engine.models.registry import REGISTRY, load_class
from engine.preflight import inspect
from engine.tp.comm import Comm
from engine.tp.sharding import Shard
from tests.engine.checkpoints import make_oracle
from tests.engine.tp.ranks import saved
from tests.engine.tp.test_equality import CASES

ITEM = 4  # bytes of a float32
SMALL = 4096  # norms, row orders, rotary frequencies


class Meter(TorchDispatchMode):
    """Counts what every operation reads of a file's mapping, and the memory of living tensors."""

    def __init__(self, mapped: list[tuple[int, int]], weights: Weights) -> None:
        super().__init__()
        self.mapped = mapped  # addresses of the mappings
        self.weights = weights
        self.read_bytes = 0
        self.live_bytes = 0
        self.beside_bytes = 0  # most that lived at once beside the layers that were finished then
        self.largest_layer = 0
        self._finished = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        if not any(self._is_mapped(output) for output in outputs):
            # What an index leaves out is not read.
            is_index = func is torch.ops.aten.index.Tensor
            read = outputs if is_index else [t for t in inputs if self._is_mapped(t)]
            if not is_index or self._is_mapped(inputs[0]):
                self.read_bytes += sum(t.numel() * t.element_size() for t in read)
        for output in outputs:
            self._keep(output)
        self.note_layers()
        return result

    def note_layers(self) -> None:
        """Look at what the finished layers hold by now."""
        finished = self.weights.memory_bytes
        self.largest_layer = max(self.largest_layer, finished - self._finished)
        self._finished = finished

    def _is_mapped(self, tensor: Tensor) -> bool:
        return any(begin <= tensor.data_ptr() < end for begin, end in self.mapped)

    def _keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if self._is_mapped(tensor) or storage._cdata in self._known:
            return
        size, key = storage.nbytes(), storage._cdata
        self._known.add(key)
        self.live_bytes += size
        self.beside_bytes = max(self.beside_bytes, self.live_bytes - self.weights.memory_bytes)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live_bytes -= size


def _load(files: ModelFiles, spec: ModelSpec, shard: Shard) -> tuple[Weights, Meter]:
    comm = Comm()
    comm.shard = shard  # nothing is computed, so no group is needed
    checkpoint = Checkpoint.open(files)
    views = [torch.frombuffer(t.view(), dtype=torch.uint8) for t in checkpoint.tensors.values()]
    stored = StoredTensors(checkpoint, spec, shard, torch.device("cpu"))
    weights = Weights(stored, spec, comm=comm, backend="reference")
    meter = Meter([(view.data_ptr(), view.data_ptr() + len(view)) for view in views], weights)
    with meter:
        model = load_class(spec.model_type)(shard.local_spec(spec), weights)
    weights.check_all_used()
    meter.note_layers()
    assert model is not None, "what it holds is counted up to here"
    return weights, meter


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize(
    ("name", "world_size"),
    [(name, size) for name in CASES for size in (1, *CASES[name][2])],
)
def test_rank_reads_its_part_and_holds_no_more_than_a_layer_beside_it(
    name: str, world_size: int, tmp_path: Path
) -> None:
    """The bytes that operations take from the mapping are the plan's; fused tensors never whole."""
    kind, fields, _ = CASES[name]
    files = saved(tmp_path / "model", make_oracle(kind, **{"num_hidden_layers": 2, **fields}))
    spec = inspect(files)
    planned = REGISTRY[spec.model_type].plan(spec).required
    for rank in range(world_size):
        shard = Shard(rank, world_size)
        weights, meter = _load(files, spec, shard)
        assert meter.read_bytes == weights.total_bytes
        parts = {}
        for key, shape in planned.items():
            part, size = shard.part(key, shape, spec), torch.Size(shape).numel()
            parts[key] = ITEM * (size if part is None else size * part.size // shape[part.axis])
        assert weights.total_bytes == sum(parts.values())
        # The layer in the making, and its ranges joined on the host; never a whole fused tensor.
        assert meter.beside_bytes <= 2 * meter.largest_layer + SMALL
        weights.close()
