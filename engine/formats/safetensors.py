"""Own reader of safetensors headers and of the sharded index, distrustful of every number.

Used by the pre-flight check (headers only) and by the loader (views of the mapped file). No torch.
A file that is truncated, inconsistent or hostile raises BadModelFile naming the file and the cause,
before anything of its size is allocated: a header has at most 100 MB and is checked entry by entry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeGuard

from cortexd.errors import BadModelFile
from engine.formats.mapped_file import MappedFile

MAX_HEADER_BYTES: Final = 100_000_000  # the format's own limit
MAX_INDEX_BYTES: Final = 64 * 1024 * 1024
MAX_DIMENSIONS: Final = 8
_MAX_ELEMENTS: Final = 1 << 62

DTYPE_BITS: Final[dict[str, int]] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


@dataclass(frozen=True, slots=True)
class SafetensorsTensor:
    """One header entry; `begin` and `end` are byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.begin


class SafetensorsFile:
    """An open `.safetensors` file: its checked header and zero-copy views of its tensors."""

    def __init__(self, mapped: MappedFile, tensors: Mapping[str, SafetensorsTensor]) -> None:
        self.path = mapped.path
        self.tensors = tensors
        self._mapped = mapped

    @classmethod
    def open(cls, path: str | Path) -> SafetensorsFile:
        """Map the file and check its header. Raises BadModelFile."""
        mapped = MappedFile(path)
        try:
            return cls(mapped, _read_header(mapped))
        except BaseException:
            mapped.close()
            raise

    def view(self, name: str) -> memoryview:
        """Return the tensor's bytes without copying; valid while anyone holds the view."""
        tensor = self.tensors[name]
        return self._mapped.view(tensor.begin, tensor.end)

    def release_pages(self) -> None:
        """Give back the resident pages of the mapping; later reads fault them in again."""
        self._mapped.release_pages()

    def close(self) -> None:
        """Close the file; views that are still held keep the mapping alive."""
        self._mapped.close()


def _read_header(mapped: MappedFile) -> dict[str, SafetensorsTensor]:
    path = mapped.path
    if mapped.size < 8:
        raise BadModelFile(f"{path}: not a safetensors file: {mapped.size} bytes, needs at least 8")
    length = int.from_bytes(mapped.view(0, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise BadModelFile(
            f"{path}: header length {length} is over the limit of {MAX_HEADER_BYTES} bytes; "
            "not a safetensors file, or a hostile one"
        )
    if length > mapped.size - 8:
        raise BadModelFile(
            f"{path}: truncated: the header should have {length} bytes, the file has "
            f"{mapped.size - 8} after its length"
        )
    header = _parse_json_object(bytes(mapped.view(8, 8 + length)), path, "header")
    header.pop("__metadata__", None)
    data_begin = 8 + length
    tensors = {
        name: _read_entry(name, entry, path, data_begin, mapped.size)
        for name, entry in header.items()
    }
    _check_coverage(tensors, path, data_begin, mapped.size)
    return tensors


def _parse_json_object(text: bytes, path: str, what: str) -> dict[str, Any]:
    """Parse a JSON object that repeats no key at any level."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise BadModelFile(f'{path}: {what} names "{_short(twice)}" twice')
        return parsed

    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise BadModelFile(f"{path}: {what} is not valid JSON: {_short(str(error))}") from None
    if not isinstance(document, dict):
        raise BadModelFile(f"{path}: {what} is a JSON {type(document).__name__}, not an object")
    return document


def _read_entry(
    name: str, entry: Any, path: str, data_begin: int, file_size: int
) -> SafetensorsTensor:
    subject = f'{path}: tensor "{_short(name)}"'
    if not isinstance(entry, dict):
        raise BadModelFile(f"{subject}: its entry is not an object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise BadModelFile(
            f"{subject}: unknown dtype {_short(repr(dtype))}; known: {', '.join(DTYPE_BITS)}"
        )
    if not _is_int_list(shape) or len(shape) > MAX_DIMENSIONS:
        raise BadModelFile(
            f"{subject}: shape {_short(repr(shape))} is not a list of at most {MAX_DIMENSIONS} "
            "non-negative integers"
        )
    if not _is_int_list(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BadModelFile(
            f"{subject}: data_offsets {_short(repr(offsets))} is not a pair [begin, end]"
        )
    if offsets[1] > file_size - data_begin:
        raise BadModelFile(
            f"{subject}: data_offsets {_short(repr(offsets))} lie beyond the file, which has "
            f"{file_size - data_begin} bytes of data; it is truncated or corrupt"
        )
    num_elements = 1
    for dimension in shape:
        num_elements *= dimension
        if num_elements > _MAX_ELEMENTS:
            raise BadModelFile(f"{subject}: shape {_short(repr(shape))} is absurdly large")
    if num_elements * DTYPE_BITS[dtype] != (offsets[1] - offsets[0]) * 8:
        raise BadModelFile(
            f"{subject}: {dtype} {shape} does not take the {offsets[1] - offsets[0]} bytes that "
            f"data_offsets {offsets} give it"
        )
    return SafetensorsTensor(
        name, dtype, tuple(shape), data_begin + offsets[0], data_begin + offsets[1]
    )


def _check_coverage(
    tensors: Mapping[str, SafetensorsTensor], path: str, data_begin: int, file_size: int
) -> None:
    """Check that the tensors fill the data section without overlap or hole."""
    position = data_begin
    for tensor in sorted(tensors.values(), key=lambda t: (t.begin, t.end)):
        if tensor.begin != position:
            fault = "overlaps the one before it" if tensor.begin < position else "leaves a hole"
            raise BadModelFile(f'{path}: tensor "{_short(tensor.name)}" {fault}')
        position = tensor.end
    if position != file_size:
        raise BadModelFile(f"{path}: {file_size - position} bytes at the end belong to no tensor")


def read_index(path: str | Path) -> dict[str, str]:
    """Return tensor name → shard file name of a `*.safetensors.index.json`.

    Raises BadModelFile. Shard names are plain file names beside the index.
    """
    path = str(path)
    mapped = MappedFile(path)
    try:
        if mapped.size > MAX_INDEX_BYTES:
            raise BadModelFile(f"{path}: {mapped.size} bytes; at most {MAX_INDEX_BYTES} allowed")
        document = _parse_json_object(bytes(mapped.view(0, mapped.size)), path, "index")
    finally:
        mapped.close()
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadModelFile(f'{path}: "weight_map" is missing, empty or not an object')
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_file_name(shard):
            raise BadModelFile(
                f'{path}: tensor "{_short(name)}" is said to be in {_short(repr(shard))}, which is '
                "not the name of a .safetensors file beside the index"
            )
    return weight_map


def _is_plain_file_name(name: str) -> bool:
    return (
        name.endswith(".safetensors") and "/" not in name and "\\" not in name and "\0" not in name
    )


def _is_int_list(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _short(text: str) -> str:
    return text if len(text) <= 120 else text[:117] + "..."
