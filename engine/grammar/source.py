"""Write grammars, in the dialect of Lark that the matcher reads.

An *expression* stands for one kind of answer; `grammar` puts it behind the reasoning that may come
first. Pure text; what a client sent goes in as JSON or as an escaped literal, so that it cannot
become grammar of its own.

Source: llguidance 1.9 `docs/syntax.md`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec

JsonObject = dict[str, Any]
Reasoning = Literal["none", "may", "open"]

# Between the elements of a JSON document: room for any usual layout, none to go on forever.
_WHITE_SPACE: Final = r"\n[ \t]{0,32}| "
_UNESCAPED: Final = re.compile(r"(\\.)|([/\n])", re.DOTALL)
_IN_REGEX: Final = {"/": r"\/", "\n": r"\n"}


def literal(text: str) -> str:
    """Return the expression of a fixed text."""
    return msgspec.json.encode(text).decode()


def choice(texts: Sequence[str]) -> str:
    """Return the expression of one of several texts."""
    return "(" + " | ".join(map(literal, texts)) + ")"


def regex(pattern: str) -> str:
    """Return the expression of all that a regular expression matches whole."""
    return "/" + _UNESCAPED.sub(lambda found: found[1] or _IN_REGEX[found[2]], pattern) + "/"


def json_value(schema: JsonObject | bool) -> str:
    """Return the expression of a JSON document that a checked schema allows."""
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    options = {"whitespace_pattern": _WHITE_SPACE}
    return "%json " + msgspec.json.encode({**schema, "x-guidance": options}).decode()


def grammar(
    expression: str,
    *,
    rules: Sequence[str] = (),
    reasoning: Reasoning = "none",
    reasoning_start: str = "",
    reasoning_end: str = "",
) -> str:
    """Return a whole grammar: the expression, after reasoning that is open or may be opened."""
    lines = ['%llguidance {"no_forcing": true}']
    if reasoning == "none":
        lines.append(f"start: {expression}")
    else:
        # As short as it can be: the first end marker ends it, as it does for the reader.
        end = re.escape(reasoning_end).replace("/", r"\/")
        opening = "" if reasoning == "open" else literal(reasoning_start) + " "
        optional = "" if reasoning == "open" else "?"
        lines += [
            f"start: thoughts{optional} answer",
            rf"thoughts: {opening}thinking /\n{{0,2}}/",
            f"thinking[lazy]: /(?s:.*){end}/",
            f"answer: {expression}",
        ]
    return "\n".join([*lines, *rules])
