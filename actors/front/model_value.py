"""Replaces the model name in a request body and leaves every other byte as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Final

import msgspec

# Strings whole, so that no bracket or quote inside one is taken for structure. What a repetition
# took it keeps: a long string would else cost memory for ways back that lead nowhere.
_STRING: Final = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_VALUE: Final = re.compile(_STRING, re.DOTALL)
_TOKEN: Final = re.compile(_STRING + rb"|[{}\[\]:,]", re.DOTALL)
_NESTED: Final = re.compile(_STRING + rb"|[{}\[\]]", re.DOTALL)
# A letter may be written as an escape.
_LETTERS: Final = [(rb"%c" % letter, rb"\\u00%02x" % letter) for letter in b"model"]
_NAME: Final = re.compile(b'"' + b"".join(rb"(?:%s|(?i:%s))" % pair for pair in _LETTERS) + b'"')
_KEY: Final = re.compile(_NAME.pattern + rb'\s*:\s*(?=")')


def with_model(body: bytes, model: str) -> bytes:
    """Return a JSON object's bytes with its top-level `model` (all, if it stands twice) replaced.

    `body` must be valid JSON whose `model` is a string.
    """
    value = msgspec.json.encode(model)
    parts: list[bytes] = []
    copied = 0
    for start, end in _places(body):
        parts += [body[copied:start], value]
        copied = end
    return b"".join([*parts, body[copied:]])


def _places(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield where the value of a top-level `model` begins and ends."""
    # Where the key stands once, that is the one; to read the structure takes far longer.
    found = list(islice(_KEY.finditer(body), 2))
    if len(found) == 1:
        value = _VALUE.match(body, found[0].end())
        assert value is not None, "the body is JSON, and a string begins here"
        yield value.span()
        return
    key = b""
    is_value = False
    at = body.index(b"{") + 1
    while (token := _TOKEN.search(body, at)) is not None:
        text, at = token.group(), token.end()
        if text in b"{[":
            at = _end_of(body, at)
        elif text in b":,":
            is_value = text == b":"
        elif text == b"}":
            return
        elif not is_value:
            key = text
        elif _NAME.fullmatch(key):
            yield token.span()


def _end_of(body: bytes, at: int) -> int:
    """Return where an object or array ends whose first bracket stands before `at`."""
    depth = 1
    for token in _NESTED.finditer(body, at):
        text = token.group()
        if text in b"{[":
            depth += 1
        elif text in b"}]":
            depth -= 1
            if depth == 0:
                return token.end()
    return len(body)
