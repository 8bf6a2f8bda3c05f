"""One model's weight files, whatever their format, as one table of canonically named tensors.

The pre-flight check uses the table, the loader also the views. Torch-free: opening reads headers
only. Every fault of a file is a BadModelFile naming that file.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

from cortexd.errors import BadModelFile
from cortexd.models import ModelFiles
from engine.formats.ggml import RUNNABLE_TYPES, GGMLType
from engine.formats.gguf_model import GGUFModel
from engine.formats.gguf_names import ROPE_FACTORS, gguf_names
from engine.formats.safetensors import SafetensorsFile, read_index

INDEX_FILE: Final = "model.safetensors.index.json"
_MAX_LISTED: Final = 10
_NESTED_PREFIX: Final = "model.language_model."
_SAFETENSORS_TYPES: Final = {
    "F32": GGMLType.F32,
    "F16": GGMLType.F16,
    "BF16": GGMLType.BF16,
}


class _OpenFile(Protocol):
    path: str

    def view(self, name: str) -> memoryview: ...
    def release_pages(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank holds of a tensor: ranges of one dimension, joined along it."""

    axis: int  # from 0
    ranges: tuple[slice, ...]

    @property
    def size(self) -> int:
        """Length of the joined dimension."""
        return sum(part.stop - part.start for part in self.ranges)


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """One tensor as stored. `ggml_type` is None for a number type the engine does not run."""

    name: str  # as the file spells it
    shape: tuple[int, ...]  # rows first
    type_name: str
    ggml_type: GGMLType | None
    num_bytes: int
    file: _OpenFile
    local: Part | None = None  # a rank's part of `stored_shape`; None: all of it
    stored_shape: tuple[int, ...] = ()

    def part(self, local: Part) -> CheckpointTensor:
        """Return the tensor that is this part of this one.

        In a quantised tensor the last dimension is cut at block boundaries, which is checked.
        """
        shape = (*self.shape[: local.axis], local.size, *self.shape[local.axis + 1 :])
        num_bytes = self.num_bytes * math.prod(shape) // math.prod(self.shape)
        return replace(self, shape=shape, num_bytes=num_bytes, local=local, stored_shape=self.shape)

    @property
    def num_elements(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)

    def view(self) -> memoryview:
        """Return the stored bytes, of a part those of the whole, mapped, not copied."""
        return self.file.view(self.name)


class Checkpoint:
    """The open weight files of one model; `tensors` is keyed by the files' own names."""

    def __init__(
        self,
        format_name: str,
        files: list[_OpenFile],
        tensors: Mapping[str, CheckpointTensor],
        file_name: Callable[[str], str],
    ) -> None:
        """Take `file_name`: how these files spell a canonical tensor name."""
        self.is_gguf = format_name == "gguf"
        self.tensors = tensors
        self.file_name = file_name
        self._files = files

    @classmethod
    def open(cls, files: ModelFiles) -> Checkpoint:
        """Open all weight files and check their headers. Raises BadModelFile."""
        if not files.weights:
            raise BadModelFile(f'model "{files.model_id}" has no weight files')
        with contextlib.ExitStack() as stack:
            if files.format == "gguf":
                checkpoint = _open_gguf(files, stack)
            else:
                checkpoint = _open_safetensors(files, stack)
            stack.pop_all()
        return checkpoint

    @classmethod
    def of_gguf(cls, model: GGUFModel) -> Checkpoint:
        """Take over an open model, which is closed with it. Raises BadModelFile."""
        tensors = {
            t.name: CheckpointTensor(
                t.name,
                t.shape,
                t.ggml_type.name,
                _runnable(t.ggml_type),
                t.num_bytes,
                model.owners[t.name],
            )
            for t in model.tensors.values()
        }
        return cls("gguf", list(model.parts), tensors, gguf_names(model.architecture))

    @property
    def path(self) -> str:
        """The file to name when the fault is not one file's: the only one, or the directory."""
        first = self._files[0].path
        return first if len(self._files) == 1 else str(Path(first).parent)

    def __getitem__(self, name: str) -> CheckpointTensor:
        """Return the tensor of this canonical name, which the plan has checked."""
        return self.tensors[self.file_name(name)]

    def __contains__(self, name: object) -> bool:
        """Tell whether there is a tensor of this canonical name."""
        return isinstance(name, str) and self.file_name(name) in self.tensors

    @property
    def rope_factors(self) -> CheckpointTensor | None:
        """GGUF of llama-3.1 and later: (head_dim / 2,) divisors of the rope frequencies."""
        return self.tensors.get(ROPE_FACTORS) if self.is_gguf else None

    def release_pages(self) -> None:
        """Drop the mapped pages from this process (a hint; views stay valid)."""
        for file in self._files:
            file.release_pages()

    def close(self) -> None:
        """Close all files; views that are still held keep their mapping alive."""
        for file in self._files:
            file.close()


def _open_gguf(files: ModelFiles, stack: contextlib.ExitStack) -> Checkpoint:
    model = GGUFModel.open(files.weights)
    stack.callback(model.close)
    return Checkpoint.of_gguf(model)


def _runnable(ggml_type: GGMLType) -> GGMLType | None:
    return ggml_type if ggml_type in RUNNABLE_TYPES else None


def _open_safetensors(files: ModelFiles, stack: contextlib.ExitStack) -> Checkpoint:
    index, shard_of = _read_index_of(files.weights)
    shards: list[_OpenFile] = []
    tensors: dict[str, CheckpointTensor] = {}
    for path in files.weights:
        shard = SafetensorsFile.open(path)
        stack.callback(shard.close)
        shards.append(shard)
        for t in shard.tensors.values():
            if t.name in tensors:
                raise BadModelFile(
                    f"{path}: tensor {t.name[:120]!r} is also in {tensors[t.name].file.path}"
                )
            tensors[t.name] = CheckpointTensor(
                t.name, t.shape, t.dtype, _SAFETENSORS_TYPES.get(t.dtype), t.num_bytes, shard
            )
    absent = [
        f"{name} (in {shard_name})"
        for name, shard_name in shard_of.items()
        if name not in tensors or Path(tensors[name].file.path).name != shard_name
    ]
    if absent:
        raise BadModelFile(
            f"{index}: {listing('tensor', absent)} named by the index and not in that shard"
        )
    return Checkpoint("safetensors", shards, tensors, _safetensors_names(tensors))


def _safetensors_names(tensors: Mapping[str, CheckpointTensor]) -> Callable[[str], str]:
    """Return how these files spell canonical names.

    The language model of a multimodal one lies under `model.language_model.`; its head does not.
    """
    if not any(name.startswith(_NESTED_PREFIX) for name in tensors):
        return lambda name: name
    return lambda name: (
        _NESTED_PREFIX + name.removeprefix("model.") if name.startswith("model.") else name
    )


def _read_index_of(weights: tuple[str, ...]) -> tuple[Path, dict[str, str]]:
    """Return the index beside the shards, and what it says; nothing for a lone file.

    Raises BadModelFile when it names a shard that is not among the files.
    """
    index = Path(weights[0]).parent / INDEX_FILE
    is_sharded = len(weights) > 1 or "-of-" in Path(weights[0]).name
    if not is_sharded or not index.is_file():
        return index, {}
    shard_of = read_index(index)
    missing = sorted(set(shard_of.values()) - {Path(path).name for path in weights})
    if missing:
        raise BadModelFile(
            f"{index}: {listing('shard', missing)} named by the index and not there; "
            "download the model again"
        )
    return index, shard_of


def listing(noun: str, items: list[str]) -> str:
    """Return "3 tensors: a, b, c", with at most ten items written out."""
    plural = noun if len(items) == 1 else f"{noun}s"
    more = f" and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    shown = ", ".join(item[:160] for item in items[:_MAX_LISTED])
    return f"{len(items)} {plural} ({shown}{more})"
