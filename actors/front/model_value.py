"""Replaces the model name in a request body and leaves every other byte as it is."""

from __future__ import annotations

import re
from typing import Final

import msgspec

# Strings whole, so that no bracket or quote inside one is taken for structure.
_TOKEN: Final = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}\[\]:,]', re.DOTALL)
_OPENING: Final = b"{["
_CLOSING: Final = b"}]"


def with_model(body: bytes, model: str) -> bytes:
    """Return a JSON object's bytes with its top-level `model` (all, if it stands twice) replaced.

    `body` must be valid JSON whose `model` is a string.
    """
    value = msgspec.json.encode(model)
    parts: list[bytes] = []
    copied = depth = 0
    key: bytes | None = None
    is_value = False
    for token in _TOKEN.finditer(body):
        text = token.group()
        if text in _OPENING:
            depth += 1
            is_value = False
        elif text in _CLOSING:
            depth -= 1
        elif text in b":,":
            is_value = text == b":" and depth == 1
        elif depth == 1 and is_value:
            is_value = False
            if _is_model(key):
                parts += [body[copied : token.start()], value]
                copied = token.end()
        elif depth == 1:
            key = text
    return b"".join([*parts, body[copied:]])


def _is_model(key: bytes | None) -> bool:
    # A key may be written with escapes.
    return key is not None and (key == b'"model"' or msgspec.json.decode(key) == "model")
