"""Own fast reader of GGUF headers: metadata, tensor table, zero-copy tensor views.

Used by the front (tokenizer metadata), the pre-flight check and the loader. Torch-free. Arrays are
only walked at open and decoded when first asked for, so a 150,000-entry vocabulary costs tens of
milliseconds. Every length in the file is checked against the file; whatever is truncated,
inconsistent or hostile raises BadModelFile naming the file and the cause, and nothing is allocated
on the word of a count. Memory stays within a small multiple of MAX_HEADER_BYTES.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cortexd.errors import BadModelFile, UnsupportedArchitecture
from engine.formats.ggml import GGMLType
from engine.formats.gguf_values import Cursor, LazyArray, Value, read_value
from engine.formats.mapped_file import MappedFile

MAGIC: Final = b"GGUF"
SUPPORTED_VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32
MAX_ALIGNMENT: Final = 1 << 20
MAX_TENSORS: Final = 1 << 16
MAX_KEYS: Final = 1 << 16
MAX_NAME_BYTES: Final = 65535
MAX_DIMENSIONS: Final = 4
_MAX_ELEMENTS: Final = 1 << 62
_MIN_KEY_BYTES: Final = 8 + 4 + 1  # empty key, type, one-byte value
_MIN_TENSOR_BYTES: Final = 8 + 4 + 8 + 4 + 8  # empty name, n_dims, one dim, type, offset


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor: `shape` is rows first (torch order), `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLType
    offset: int
    num_bytes: int


class GGUFMetadata(Mapping[str, Value]):
    """The key-value section; arrays become lists on first access and are kept."""

    def __init__(self, values: dict[str, Value | LazyArray]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Value:
        value = self._values[key]
        if isinstance(value, LazyArray):
            value = self._values[key] = value.decode()
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def array_length(self, key: str) -> int | None:
        """Return the length of an array without decoding it; None when it is no array."""
        value = self._values.get(key)
        return len(value) if isinstance(value, LazyArray | list) else None


class GGUFFile:
    """An open GGUF file: checked header and zero-copy views of its tensors."""

    def __init__(
        self, mapped: MappedFile, metadata: GGUFMetadata, tensors: Mapping[str, GGUFTensor]
    ) -> None:
        self.path = mapped.path
        self.metadata = metadata
        self.tensors = tensors
        self._mapped = mapped

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Map the file and check its whole header.

        A part of a split model is opened like any other file; see `GGUFModel`. Raises:
        BadModelFile, and UnsupportedArchitecture for a tensor type unknown to GGML.
        """
        mapped = MappedFile(path)
        try:
            return cls(mapped, *_read_header(mapped))
        except BaseException:
            mapped.close()
            raise

    @property
    def architecture(self) -> str:
        """The value of general.architecture. Raises BadModelFile when it is missing."""
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str) or not name:
            raise BadModelFile(f"{self.path}: general.architecture is missing or not a string")
        return name

    def view(self, name: str) -> memoryview:
        """Return the tensor's bytes without copying; valid while anyone holds the view."""
        tensor = self.tensors[name]
        return self._mapped.view(tensor.offset, tensor.offset + tensor.num_bytes)

    def release_pages(self) -> None:
        """Give back the resident pages of the mapping; later reads fault them in again."""
        self._mapped.release_pages()

    def close(self) -> None:
        """Close the file; views that are still held keep the mapping alive."""
        self._mapped.close()


def _read_header(mapped: MappedFile) -> tuple[GGUFMetadata, dict[str, GGUFTensor]]:
    cursor = Cursor(mapped.data, mapped.size, mapped.path)
    _check_magic_and_version(cursor)
    num_tensors, num_keys = cursor.u64("tensor count"), cursor.u64("key count")
    _check_count(cursor, "tensor count", num_tensors, MAX_TENSORS, _MIN_TENSOR_BYTES)
    _check_count(cursor, "metadata key count", num_keys, MAX_KEYS, _MIN_KEY_BYTES)
    values = _read_metadata(cursor, num_keys)
    metadata = GGUFMetadata(values)
    alignment = _read_alignment(metadata, mapped.path)
    infos = [_read_tensor_info(cursor) for _ in range(num_tensors)]
    data_begin = -(-cursor.position // alignment) * alignment
    tensors = _place_tensors(infos, data_begin, alignment, mapped)
    return metadata, tensors


def _check_magic_and_version(cursor: Cursor) -> None:
    magic = cursor.take(4, "magic")
    if magic != MAGIC:
        raise BadModelFile(
            f"{cursor.path}: not a GGUF file: it begins with {magic!r}, not {MAGIC!r}"
        )
    version = cursor.u32("version")
    if version and version & 0xFFFF == 0:
        raise BadModelFile(
            f"{cursor.path}: big-endian GGUF is not supported; convert the file to little-endian"
        )
    if version not in SUPPORTED_VERSIONS:
        raise BadModelFile(
            f"{cursor.path}: GGUF version {version} is not supported; supported: "
            f"{', '.join(map(str, SUPPORTED_VERSIONS))}"
        )


def _check_count(cursor: Cursor, what: str, count: int, limit: int, min_bytes: int) -> None:
    if count > limit:
        raise BadModelFile(f"{cursor.path}: {what} {count} is absurd; at most {limit} are accepted")
    if count * min_bytes > cursor.size - cursor.position:
        raise BadModelFile(
            f"{cursor.path}: {what} {count} needs more bytes than the file has; "
            "truncated or corrupt"
        )


def _read_metadata(cursor: Cursor, num_keys: int) -> dict[str, Value | LazyArray]:
    values: dict[str, Value | LazyArray] = {}
    for _ in range(num_keys):
        key = cursor.string("metadata key", MAX_NAME_BYTES)
        if key in values:
            raise BadModelFile(f"{cursor.path}: metadata key {key[:120]!r} occurs twice")
        values[key] = read_value(cursor, key)
    return values


def _read_alignment(metadata: GGUFMetadata, path: str) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if (
        type(alignment) is not int
        or not 1 <= alignment <= MAX_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        raise BadModelFile(
            f"{path}: general.alignment {alignment!r:.40} is not a power of two up to "
            f"{MAX_ALIGNMENT}"
        )
    return alignment


def _read_tensor_info(cursor: Cursor) -> GGUFTensor:
    """Read one entry of the tensor table; `offset` is still relative to the data section."""
    name = cursor.string("tensor name", MAX_NAME_BYTES)
    subject = f"{cursor.path}: tensor {name[:120]!r}"
    num_dimensions = cursor.u32(f"dimension count of tensor {name[:120]!r}")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise BadModelFile(f"{subject}: {num_dimensions} dimensions; 1 to {MAX_DIMENSIONS} allowed")
    raw = cursor.take(8 * num_dimensions + 12, f"entry of tensor {name[:120]!r}")
    *dimensions, type_number, offset = struct.unpack(f"<{num_dimensions}QIQ", raw)
    try:
        ggml_type = GGMLType(type_number)
    except ValueError:
        raise UnsupportedArchitecture(
            f"{subject}: unknown GGML type number {type_number}; the file may be newer than this "
            "engine, see engine/formats/ggml.py"
        ) from None
    num_elements = 1
    for dimension in dimensions:
        num_elements *= dimension
        if dimension == 0 or num_elements > _MAX_ELEMENTS:
            raise BadModelFile(f"{subject}: impossible dimensions {dimensions}")
    if dimensions[0] % ggml_type.block_elements:
        raise BadModelFile(
            f"{subject}: rows of {dimensions[0]} weights are not a multiple of the "
            f"{ggml_type.name} block of {ggml_type.block_elements}"
        )
    return GGUFTensor(
        name, tuple(reversed(dimensions)), ggml_type, offset, ggml_type.row_bytes(num_elements)
    )


def _place_tensors(
    infos: list[GGUFTensor], data_begin: int, alignment: int, mapped: MappedFile
) -> dict[str, GGUFTensor]:
    """Turn relative offsets into file offsets; check alignment, range, overlap, duplicates."""
    tensors: dict[str, GGUFTensor] = {}
    end_of_previous = data_begin
    for info in sorted(infos, key=lambda info: info.offset):
        subject = f"{mapped.path}: tensor {info.name[:120]!r}"
        offset = data_begin + info.offset
        if info.offset % alignment:
            raise BadModelFile(f"{subject}: offset {info.offset} is not aligned to {alignment}")
        if offset + info.num_bytes > mapped.size:
            raise BadModelFile(
                f"{subject}: its {info.num_bytes} bytes at {offset} reach beyond the end of the "
                f"file ({mapped.size} bytes); truncated or corrupt"
            )
        if offset < end_of_previous:
            raise BadModelFile(f"{subject}: overlaps the tensor before it at offset {info.offset}")
        if info.name in tensors:
            raise BadModelFile(f"{subject}: the name occurs twice")
        end_of_previous = offset + info.num_bytes
        tensors[info.name] = GGUFTensor(
            info.name, info.shape, info.ggml_type, offset, info.num_bytes
        )
    return tensors
