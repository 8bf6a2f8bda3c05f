"""One model's GGUF files as one: a single file, or the parts of a split one in their order.

Used by the pre-flight check and the loader. The first part holds the metadata; tensors may be in
any part. Torch-free. Every inconsistency is a BadModelFile naming the part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Final

from cortexd.errors import BadModelFile
from engine.formats.gguf import GGUFFile, GGUFMetadata, GGUFTensor

MAX_PARTS: Final = 10_000


class GGUFModel:
    """The open parts. `metadata` is the first part's; `tensors` are those of all parts."""

    def __init__(self, parts: Sequence[GGUFFile], owners: Mapping[str, GGUFFile]) -> None:
        self.parts = list(parts)
        self.path = parts[0].path
        self.metadata: GGUFMetadata = parts[0].metadata
        self.owners = owners  # tensor name → the part that holds it
        self.tensors: Mapping[str, GGUFTensor] = {
            name: part.tensors[name] for name, part in owners.items()
        }

    @classmethod
    def open(cls, paths: Sequence[str]) -> GGUFModel:
        """Open all parts and check that they belong together.

        Raises: BadModelFile, UnsupportedArchitecture.
        """
        with contextlib.ExitStack() as stack:
            parts: list[GGUFFile] = []
            for path in paths:
                parts.append(GGUFFile.open(path))
                stack.callback(parts[-1].close)
            for index, part in enumerate(parts):
                _check_part(part, index, len(parts))
            model = cls(parts, _owners(parts))
            stack.pop_all()
        return model

    @property
    def architecture(self) -> str:
        """The value of general.architecture. Raises BadModelFile when it is missing."""
        return self.parts[0].architecture

    def close(self) -> None:
        """Close all parts; views that are still held keep their mapping alive."""
        for part in self.parts:
            part.close()


def _check_part(part: GGUFFile, index: int, num_parts: int) -> None:
    count = _count(part, "split.count", 1)
    number = _count(part, "split.no", 0)
    # A split into one part has a count of 0 or 1, depending on the tool.
    if max(count, 1) != num_parts:
        raise BadModelFile(
            f"{part.path}: one of {count} parts of a split GGUF (split.count), and {num_parts} "
            "of them were found; all parts must lie in one directory"
        )
    if number != index:
        raise BadModelFile(
            f"{part.path}: split.no is {number}, but it stands at {index} by its name"
        )


def _count(part: GGUFFile, key: str, default: int) -> int:
    value = part.metadata.get(key, default)
    if type(value) is not int or not 0 <= value <= MAX_PARTS:
        raise BadModelFile(f"{part.path}: {key} is {value!r:.40}; it must be 0 to {MAX_PARTS}")
    return value


def _owners(parts: Sequence[GGUFFile]) -> dict[str, GGUFFile]:
    owners: dict[str, GGUFFile] = {}
    for part in parts:
        for name in part.tensors:
            if name in owners:
                raise BadModelFile(
                    f"{part.path}: tensor {name[:120]!r} is also in {owners[name].path}"
                )
            owners[name] = part
    expected = parts[0].metadata.get("split.tensors.count")
    if len(parts) > 1 and isinstance(expected, int) and expected != len(owners):
        raise BadModelFile(
            f"{parts[0].path}: split.tensors.count is {expected}, the parts hold {len(owners)}"
        )
    return owners
