"""The pieces an answer is made of: text for the reader, reasoning, and calls of tools.

Made by `AnswerParser`, kept in the order in which the model wrote them.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field


@dataclass(slots=True, frozen=True)
class Text:
    """Words for the reader."""

    text: str


@dataclass(slots=True, frozen=True)
class Reasoning:
    """Words the model thinks with, without its markers."""

    text: str


def _new_key() -> str:
    return uuid.uuid4().hex[:24]


@dataclass(slots=True, frozen=True)
class ToolCall:
    """One whole call. `arguments` is a JSON object as text; `key` makes its id in any dialect."""

    name: str
    arguments: str
    key: str = field(default_factory=_new_key, compare=False)


Piece = Text | Reasoning | ToolCall


def add_piece(pieces: list[Piece], piece: Piece) -> None:
    """Append a piece; text that follows text of its own kind is joined to it."""
    last = pieces[-1] if pieces else None
    if isinstance(piece, Text) and isinstance(last, Text):
        pieces[-1] = Text(last.text + piece.text)
    elif isinstance(piece, Reasoning) and isinstance(last, Reasoning):
        pieces[-1] = Reasoning(last.text + piece.text)
    else:
        pieces.append(piece)
