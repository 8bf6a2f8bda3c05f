"""Splits an answer, as it streams, into text, reasoning and tool calls.

One `AnswerParser` per answer, made by `AnswerFormat`; pure. However the text is cut into pushes,
the pieces add up to the same. A marker that may have begun is held back, and white space that may
turn out to stand beside a marker: there it is layout and dropped. Reasoning opens only where no
text stands before it. A tool block is held until it closes; one that spells no call is text like
any other, and so is one that was cut off. An end marker inside a value of a call does not close it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal

from engine.text.answer import Piece, Reasoning, Text, ToolCall, add_piece
from engine.text.call_style import FUNCTION, TOOL_CALL, TOOL_CALLS, CallStyle
from engine.text.tool_calls import ToolSchemas, goes_on, parse_mistral_calls, parse_tool_call

_BARE_OPENING: Final = "{"


@dataclass(slots=True, frozen=True)
class Markers:
    """The two words around a section of an answer."""

    start: str
    end: str


@dataclass(slots=True, frozen=True)
class _Block:
    """What encloses a call. Without an `end` it lasts to the next `start`, or to the answer's end.

    `is_call` when the markers are part of the call itself.
    """

    start: str
    end: str
    is_call: bool = False


_TAGGED: Final = _Block(*TOOL_CALL)
_FUNCTION_BLOCK: Final = _Block(*FUNCTION, is_call=True)
_MISTRAL: Final = _Block(TOOL_CALLS, "")


def _blocks_of(style: CallStyle) -> list[_Block]:
    """Return what calls stand in; nothing when a call is the whole rest of an answer."""
    if style.form in ("mistral_list", "mistral_args"):
        return [_MISTRAL]
    tagged = [_TAGGED] if style.is_tagged else []
    # Qwen's coders often forget the outer markers.
    return [*tagged, _FUNCTION_BLOCK] if style.form == "xml" else tagged


class AnswerParser:
    """The state of one answer.

    `schemas` is None when no tool may be called; `style` says how the model calls them.
    """

    def __init__(
        self,
        reasoning: Markers | None,
        *,
        is_reasoning: bool = False,
        schemas: ToolSchemas | None = None,
        style: CallStyle | None = None,
    ) -> None:
        self._reasoning = reasoning
        self._schemas = schemas or {}
        self._blocks = [] if schemas is None else _blocks_of(style or CallStyle("json"))
        self._starts = {block.start: block for block in self._blocks}
        self._strays = [TOOL_CALL[1]] if _FUNCTION_BLOCK in self._blocks else []
        self._openings = self._find_openings(has_tools=schemas is not None)
        self._state: Literal["start", "text", "reasoning", "tool", "bare"] = "start"
        self._buffer = ""
        self._scanned = 0  # of an open tool block: its end cannot begin before this
        self._block: _Block | None = None  # the open one
        self._space = ""  # white space before it
        self._has_call = False
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
        if has_tools:
            openings += list(self._starts) or [_BARE_OPENING]
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
        strays = self._strays if self._has_call else []
        for opening in [*self._openings, *strays]:
            if words.startswith(opening):
                self._open(opening)
                return True
        if not words or any(one.startswith(words) for one in [*self._openings, *strays]):
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
        elif opening in self._starts:
            self._open_tool(self._starts[opening], space, rest)
        elif opening in self._strays:
            self._buffer = rest  # the end of a block that was never opened
        else:
            self._state, self._space = "bare", "" if self._drops_space else space
            self._buffer = opening + rest

    def _open_reasoning(self) -> None:
        self._state, self._drops_space = "reasoning", True

    def _open_tool(self, block: _Block, space: str, rest: str) -> None:
        self._state, self._scanned, self._block = "tool", 0, block
        self._space = "" if self._drops_space else space
        self._buffer = rest

    def _read_text(self) -> bool:
        found = [(self._buffer.find(start), start) for start in self._starts]
        found = [(place, start) for place, start in found if place >= 0]
        if not found:
            self._add_text(self._release(self._starts))
            return False
        place, start = min(found)
        words = self._buffer[:place].rstrip()
        space, rest = self._buffer[len(words) : place], self._buffer[place + len(start) :]
        self._add_text(words)
        self._drops_space = False
        self._open_tool(self._starts[start], space, rest)
        return True

    def _read_reasoning(self) -> bool:
        assert self._reasoning is not None, "reasoning has markers"
        if self._drops_space:
            self._buffer = self._buffer.lstrip()
        before, found, rest = self._buffer.partition(self._reasoning.end)
        if not found:
            self._add_reasoning(self._release([self._reasoning.end]))
            return False
        self._add_reasoning(before.rstrip())
        self._buffer, self._state, self._drops_space = rest, "start", True
        return True

    def _read_tool(self) -> bool:
        block = self._block
        assert block is not None, "this state has a block"
        end = block.end or block.start
        found = self._buffer.find(end, self._scanned)
        if found < 0:
            self._scanned = max(len(self._buffer) - len(end) + 1, 0)
            return False
        body = self._buffer[:found]
        if goes_on((block.start if block.is_call else "") + body):
            self._scanned = found + len(end)
            return True
        rest = self._buffer[found + len(block.end) :]
        self._close_tool(body, block.end)
        self._buffer = rest
        return True

    def _close_tool(self, body: str, end: str) -> None:
        calls = self._calls(body, end)
        if not calls:
            start = self._block.start if self._block is not None else ""
            self._add_text(self._space + start + body + end)
            self._state = "text"
        else:
            self._pieces += calls
            self._state, self._drops_space, self._has_call = "start", True, True
        self._block = None

    def _calls(self, body: str, end: str) -> list[ToolCall]:
        if self._block == _MISTRAL:
            return parse_mistral_calls(body)
        if self._block is not None and self._block.is_call:
            body = self._block.start + body + end
        call = parse_tool_call(body, self._schemas)
        return [] if call is None else [call]

    # What is sent and what is kept

    def _release(self, markers: Collection[str]) -> str:
        """Return the buffer's part that can be no marker, nor the space before one."""
        if not markers:
            text, self._buffer = self._buffer, ""
            return text
        held = max(_overlap(self._buffer, marker) for marker in markers)
        kept = self._buffer[: len(self._buffer) - held].rstrip()
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


def _overlap(text: str, marker: str) -> int:
    """Return how many characters at the end of `text` may begin the marker."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
