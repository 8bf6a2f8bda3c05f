"""How a model writes what is not text: found in its tokenizer, applied to one prompt.

A pair of markers counts when both are added tokens, so that words that merely look like markers
are never taken for them in models that do not have them. Whether an answer begins inside the
reasoning is read from the end of its prompt: many templates open the section themselves.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from engine.text.answer_parser import AnswerParser, Markers
from engine.text.call_style import (
    ARGUMENTS,
    CALL_ID,
    TOOL_CALL,
    TOOL_CALLS,
    CallStyle,
    read_call_style,
)
from engine.text.tool_calls import ToolSchemas, schemas_of

_REASONING: Final = (
    Markers("<think>", "</think>"),
    Markers("[THINK]", "[/THINK]"),
    Markers("<thought>", "</thought>"),
    Markers("<reasoning>", "</reasoning>"),
    Markers("<seed:think>", "</seed:think>"),
)


@dataclass(slots=True, frozen=True)
class AnswerFormat:
    """How to read the answer to one prompt. `schemas` is None when no tool may be called.

    `may_reason` tells whether the answer may still open a reasoning: not when it is open already,
    nor when the prompt has closed it.
    """

    reasoning: Markers | None
    begins_in_reasoning: bool
    may_reason: bool
    schemas: ToolSchemas | None
    style: CallStyle

    def parser(self) -> AnswerParser:
        """Return the parser of one answer."""
        return AnswerParser(
            self.reasoning,
            is_reasoning=self.begins_in_reasoning,
            schemas=self.schemas,
            style=self.style,
        )


def reasoning_markers(added_tokens: Collection[str]) -> Markers | None:
    """Return the markers a model has tokens for."""
    for markers in _REASONING:
        if markers.start in added_tokens and markers.end in added_tokens:
            return markers
    return None


def marker_tokens(added_tokens: Collection[str]) -> set[str]:
    """Return the added tokens that mark a section of an answer."""
    reasoning = reasoning_markers(added_tokens)
    markers = {*TOOL_CALL} if _has_tools(added_tokens) else set()
    markers |= {reasoning.start, reasoning.end} if reasoning is not None else set()
    return markers | ({TOOL_CALLS, ARGUMENTS, CALL_ID} & set(added_tokens))


def answer_format(
    added_tokens: Collection[str],
    prompt: str,
    tools: list[dict[str, Any]] | None,
    style: CallStyle | None = None,
) -> AnswerFormat | None:
    """Return how to read the answer to `prompt`, None when all of it is text.

    `style` is what the template showed of itself. Templates of models without tokens for it may
    teach the tool markers in words: then they stand in the prompt.
    """
    reasoning = reasoning_markers(added_tokens)
    if reasoning is None and not tools:
        return None
    words = prompt.rstrip()
    begins_in_reasoning = reasoning is not None and words.endswith(reasoning.start)
    is_closed = reasoning is not None and words.endswith(reasoning.end)
    return AnswerFormat(
        reasoning,
        begins_in_reasoning,
        reasoning is not None and not begins_in_reasoning and not is_closed,
        schemas_of(tools) if tools else None,
        style or read_call_style("", prompt, added_tokens),
    )


def _has_tools(added_tokens: Collection[str]) -> bool:
    return all(token in added_tokens for token in TOOL_CALL)
