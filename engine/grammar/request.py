"""The grammar of one request: an answer's form, calls in the model's own style, or either.

Made by the fronts when the prompt is known, since whether reasoning comes first is read from that.
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.grammar.calls import CallGrammar, object_schema
from engine.grammar.source import JsonObject, Reasoning, grammar, json_value
from engine.text.answer_format import AnswerFormat


class RequestGrammar:
    """Collects what an answer may be. `answer_format` is None when all of an answer is text."""

    def __init__(self, answer_format: AnswerFormat | None) -> None:
        self._format = answer_format
        self._alternatives: list[str] = []
        self._rules: list[str] = []

    def of_answer(self, expression: str) -> str:
        """Add a form of text; return the grammar of that alone, to be checked."""
        self._alternatives.append(expression)
        return grammar(expression)

    def of_arguments(self, schema: JsonObject) -> str:
        """Return the grammar of a tool's arguments alone, to be checked."""
        return grammar(json_value(object_schema(schema)))

    def add_calls(
        self, schemas: Mapping[str, JsonObject], params: Mapping[str, str], *, is_single: bool
    ) -> None:
        """Add calls of these tools. Raises: UnsupportedParameter."""
        assert self._format is not None, "a request with tools has an answer format"
        calls = CallGrammar(self._format.style, schemas, params)
        self._alternatives.append(calls.expression(is_single=is_single))
        self._rules += calls.rules

    def text(self) -> str:
        """Return the whole grammar."""
        expression = " | ".join(f"({one})" for one in self._alternatives)
        found = self._format
        if found is None or found.reasoning is None:
            return grammar(expression, rules=self._rules)
        reasoning: Reasoning = "may" if found.may_reason else "none"
        return grammar(
            expression,
            rules=self._rules,
            reasoning="open" if found.begins_in_reasoning else reasoning,
            reasoning_start=found.reasoning.start,
            reasoning_end=found.reasoning.end,
        )
