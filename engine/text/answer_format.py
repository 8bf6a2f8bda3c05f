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
from engine.text.tool_calls import ToolSchemas, schemas_of

_REASONING: Final = (
    Markers("<think>", "</think>"),
    Markers("[THINK]", "[/THINK]"),
    Markers("<thought>", "</thought>"),
    Markers("<reasoning>", "</reasoning>"),
    Markers("<seed:think>", "</seed:think>"),
)
_TOOLS: Final = Markers("<tool_call>", "</tool_call>")


@dataclass(slots=True, frozen=True)
class AnswerFormat:
    """How to read the answer to one prompt. `schemas` is None when no tool may be called."""

    reasoning: Markers | None
    begins_in_reasoning: bool
    schemas: ToolSchemas | None
    tool_markers: Markers | None

    def parser(self) -> AnswerParser:
        """Return the parser of one answer."""
        return AnswerParser(
            self.reasoning,
            is_reasoning=self.begins_in_reasoning,
            schemas=self.schemas,
            tool_markers=self.tool_markers,
        )


def reasoning_markers(added_tokens: Collection[str]) -> Markers | None:
    """Return the markers a model has tokens for."""
    for markers in _REASONING:
        if markers.start in added_tokens and markers.end in added_tokens:
            return markers
    return None


def marker_tokens(added_tokens: Collection[str]) -> set[str]:
    """Return the added tokens that mark a section of an answer."""
    pairs = [reasoning_markers(added_tokens), _TOOLS if _has_tools(added_tokens) else None]
    return {token for pair in pairs if pair is not None for token in (pair.start, pair.end)}


def answer_format(
    added_tokens: Collection[str], prompt: str, tools: list[dict[str, Any]] | None
) -> AnswerFormat | None:
    """Return how to read the answer to `prompt`, None when all of it is text.

    Templates of models without tokens for it may teach the tool markers in words: then they stand
    in the prompt. A model with neither writes its call as bare JSON.
    """
    reasoning = reasoning_markers(added_tokens)
    if reasoning is None and not tools:
        return None
    is_tagged = _has_tools(added_tokens) or _TOOLS.start in prompt
    return AnswerFormat(
        reasoning,
        reasoning is not None and prompt.rstrip().endswith(reasoning.start),
        schemas_of(tools) if tools else None,
        _TOOLS if is_tagged else None,
    )


def _has_tools(added_tokens: Collection[str]) -> bool:
    return _TOOLS.start in added_tokens and _TOOLS.end in added_tokens
