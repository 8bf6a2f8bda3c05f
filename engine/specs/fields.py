"""Typed, range-checked reads from a parsed JSON object or GGUF metadata.

Every message names the file, the field, the value found and what is allowed. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from cortexd.errors import BadModelFile

_MAX_SHOWN: Final = 80
_MAX_END_TOKENS: Final = 64


class Fields:
    """A mapping and the file it came from. None counts as absent, as in Hugging Face configs."""

    def __init__(self, values: Mapping[str, Any], file: str) -> None:
        self.values = values
        self.file = file

    @staticmethod
    def shown(value: object) -> str:
        """Return a short printable form of a value of unknown size."""
        if isinstance(value, list | dict) and len(value) > 8:
            return f"a {type(value).__name__} of {len(value)}"
        if isinstance(value, int) and abs(value) > 1 << 64:
            return "an integer beyond 64 bits"
        text = repr(value)
        return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."

    def wrong(self, key: str, allowed: str) -> BadModelFile:
        """Return the error for the value of `key`."""
        value = self.values.get(key)
        found = "is missing" if value is None else f"is {self.shown(value)}"
        return BadModelFile(f"{self.file}: {key} {found}; it must be {allowed}")

    def integer(
        self, key: str, *, minimum: int = 1, maximum: int, default: int | None = None
    ) -> int:
        """Return an integer within [minimum, maximum]."""
        value = self.values.get(key)
        if value is None:
            value = default
        if type(value) is not int or not minimum <= value <= maximum:
            raise self.wrong(key, f"an integer from {minimum} to {maximum}")
        return value

    def uniform_integer(self, key: str, *, maximum: int, default: int | None = None) -> int:
        """Return an integer that GGUF may also give per layer, when all layers agree."""
        value = self.values.get(key)
        if not isinstance(value, list):
            return self.integer(key, maximum=maximum, default=default)
        if not value or len(set(value)) != 1:
            raise self.wrong(key, "the same for all layers")
        return Fields({key: value[0]}, self.file).integer(key, maximum=maximum)

    def number(
        self, key: str, *, minimum: float, maximum: float, default: float | None = None
    ) -> float:
        """Return a finite number within (minimum, maximum]."""
        value = self.values.get(key)
        if value is None:
            value = default
        # An int may be too large for a float: compare before converting.
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not minimum < value <= maximum
            or not math.isfinite(value)
        ):
            raise self.wrong(key, f"a number above {minimum:g} and at most {maximum:g}")
        return float(value)

    def boolean(self, key: str, *, default: bool) -> bool:
        """Return true or false."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def integers(self, key: str, limit: int) -> frozenset[int]:
        """Return a list of integers from 0 to limit - 1, as a set; empty when absent."""
        value = self.values.get(key)
        if value is None:
            return frozenset()
        if (
            not isinstance(value, list)
            or len(value) > limit
            or not all(type(item) is int and 0 <= item < limit for item in value)
        ):
            raise self.wrong(key, f"a list of integers from 0 to {limit - 1}")
        return frozenset(value)

    def strings(self, key: str) -> list[str]:
        """Return a list of strings; empty when absent."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "a list of strings")
        return value

    def mapping(self, key: str) -> Mapping[str, Any]:
        """Return a nested object; empty when absent."""
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return value

    def token_ids(self, key: str, vocab_size: int) -> list[int]:
        """Return one id or a list of ids, all within the vocabulary; empty when absent."""
        value = self.values.get(key)
        if value is None:
            return []
        ids = value if isinstance(value, list) else [value]
        if len(ids) > _MAX_END_TOKENS or not all(
            type(item) is int and 0 <= item < vocab_size for item in ids
        ):
            raise self.wrong(key, f"a token id (or a few) from 0 to {vocab_size - 1}")
        return ids
