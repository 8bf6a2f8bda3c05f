"""Splits an answer, as it streams, into text, reasoning and tool calls.

One `AnswerParser` per answer, made by `AnswerFormat`; pure. However the text is cut into pushes,
the pieces add up to the same. A marker that may have begun is held back, and white space that may
turn out to stand beside a marker: there it is layout and dropped. Reasoning opens only where no
text stands before it. A tool block is held until it closes; one that spells no call is text like
any other, and so is one that was cut off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from engine.text.answer import Piece, Reasoning, Text, add_piece
from engine.text.tool_calls import ToolSchemas, parse_tool_call

_BARE_OPENING: Final = "{"


@dataclass(slots=True, frozen=True)
class Markers:
    """The two words around a section of an answer."""

    start: str
    end: str


class AnswerParser:
    """The state of one answer.

    `schemas` is None when no tool may be called; `tool_markers` None means that a call is the whole
    rest of an answer, a bare JSON object.
    """

    def __init__(
        self,
        reasoning: Markers | None,
        *,
        is_reasoning: bool = False,
        schemas: ToolSchemas | None = None,
        tool_markers: Markers | None = None,
    ) -> None:
        self._reasoning = reasoning
        self._schemas = schemas or {}
        self._tools = None if schemas is None else tool_markers
        self._openings = self._find_openings(has_tools=schemas is not None)
        self._state: Literal["start", "text", "reasoning", "tool", "bare"] = "start"
        self._buffer = ""
        self._scanned = 0  # of an open tool block: its end cannot begin before this
        self._block = ""  # the open tool block: white space and marker before its body
        self._drops_space = False
        self._pieces: list[Piece] = []
        if is_reasoning:
            self._open_reasoning()

    @property
    def is_reasoning(self) -> bool:
        """Tell whether what comes next is reasoning."""
        return self._state == "reasoning"

    def push(self, text: str) -> list[Piece]:
        """Return the pieces that `text` completes."""
        self._buffer += text
        while self._advance():
            pass
        return self._take()

    def flush(self) -> list[Piece]:
        """Return what was held back: the answer has ended."""
        rest, self._buffer = self._buffer, ""
        if self._state == "reasoning":
            self._add_reasoning(rest)
        elif self._state in {"tool", "bare"}:
            self._close_tool(rest, "")
        else:
            self._add_text(rest.lstrip() if self._state == "start" and self._drops_space else rest)
        return self._take()

    def _find_openings(self, *, has_tools: bool) -> list[str]:
        """Return the words that open a section when they are the first of an answer."""
        openings = [self._reasoning.start] if self._reasoning is not None else []
        if self._tools is not None:
            openings.append(self._tools.start)
        elif has_tools:
            openings.append(_BARE_OPENING)
        return openings

    # One step in each state; True when there may be more to do

    def _advance(self) -> bool:
        if self._state == "start":
            return self._open_answer()
        if self._state == "text":
            return self._read_text()
        if self._state == "reasoning":
            return self._read_reasoning()
        return self._state == "tool" and self._read_tool()

    def _open_answer(self) -> bool:
        """Look at the first word, once it is known what it is."""
        words = self._buffer.lstrip()
        for opening in self._openings:
            if words.startswith(opening):
                self._open(opening)
                return True
        if not words or any(opening.startswith(words) for opening in self._openings):
            return False
        if self._drops_space:
            self._buffer = words
        self._state = "text"
        return True

    def _open(self, opening: str) -> None:
        space, _, rest = self._buffer.partition(opening)
        if self._reasoning is not None and opening == self._reasoning.start:
            self._buffer = rest
            self._open_reasoning()
        elif self._tools is not None:
            self._open_tool(space, rest)
        else:
            self._state, self._block = "bare", "" if self._drops_space else space
            self._buffer = opening + rest

    def _open_reasoning(self) -> None:
        self._state, self._drops_space = "reasoning", True

    def _open_tool(self, space: str, rest: str) -> None:
        assert self._tools is not None, "only a known marker opens a block"
        self._state, self._scanned = "tool", 0
        self._block = ("" if self._drops_space else space) + self._tools.start
        self._buffer = rest

    def _read_text(self) -> bool:
        if self._tools is None:
            text, self._buffer = self._buffer, ""
            self._add_text(text)
            return False
        before, found, rest = self._buffer.partition(self._tools.start)
        if not found:
            self._add_text(self._release(self._tools.start))
            return False
        words = before.rstrip()
        self._add_text(words)
        self._drops_space = False
        self._open_tool(before[len(words) :], rest)
        return True

    def _read_reasoning(self) -> bool:
        assert self._reasoning is not None, "reasoning has markers"
        if self._drops_space:
            self._buffer = self._buffer.lstrip()
        before, found, rest = self._buffer.partition(self._reasoning.end)
        if not found:
            self._add_reasoning(self._release(self._reasoning.end))
            return False
        self._add_reasoning(before.rstrip())
        self._buffer, self._state, self._drops_space = rest, "start", True
        return True

    def _read_tool(self) -> bool:
        assert self._tools is not None, "a block has markers"
        end = self._tools.end
        found = self._buffer.find(end, self._scanned)
        if found < 0:
            self._scanned = max(len(self._buffer) - len(end) + 1, 0)
            return False
        body, rest = self._buffer[:found], self._buffer[found + len(end) :]
        self._close_tool(body, end)
        self._buffer = rest
        return True

    def _close_tool(self, body: str, end: str) -> None:
        call = parse_tool_call(body, self._schemas)
        if call is None:
            self._add_text(self._block + body + end)
            self._state = "text"
            return
        self._pieces.append(call)
        self._state, self._drops_space = "start", True

    # What is sent and what is kept

    def _release(self, marker: str) -> str:
        """Return the buffer's part that can be neither this marker nor the space before it."""
        kept = self._buffer
        for length in range(min(len(marker) - 1, len(kept)), 0, -1):
            if kept.endswith(marker[:length]):
                kept = kept[:-length]
                break
        kept = kept.rstrip()
        self._buffer = self._buffer[len(kept) :]
        return kept

    def _add_text(self, text: str) -> None:
        if text:
            add_piece(self._pieces, Text(text))

    def _add_reasoning(self, text: str) -> None:
        if text:
            self._drops_space = False
            add_piece(self._pieces, Reasoning(text))

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces
