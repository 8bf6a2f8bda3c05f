"""Forced calls: whatever a model writes under the grammar, its own parser reads as valid calls."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any

import jsonschema
import pytest

from cortexd.errors import UnsupportedParameter
from engine.grammar.request import RequestGrammar
from engine.text.answer import Piece, Reasoning, ToolCall, add_piece
from engine.text.answer_format import AnswerFormat
from engine.text.answer_parser import Markers
from engine.text.call_style import CallStyle
from tests.engine.grammar.walk import random_text

SCHEMAS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 9},
            "words": {"type": "string"},
            "unit": {"enum": ["c", "f"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
        },
        "required": ["city", "words", "unit"],
    },
    "note": {
        "type": "object",
        "properties": {
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
            "place": {"$ref": "#/$defs/place"},
            "code": {"type": "string", "pattern": "^[a-z]{2}-[0-9]+$", "maxLength": 8},
            "size": {"type": ["integer", "null"], "maximum": 99, "minimum": 0},
        },
        "required": ["place", "code"],
        "$defs": {
            "place": {
                "type": "object",
                "properties": {"x": {"type": "boolean"}},
                "required": ["x"],
                "additionalProperties": False,
            }
        },
    },
    "nothing": {},
}
PARAMS = {name: f"tools[{n}].function.parameters" for n, name in enumerate(SCHEMAS)}
STYLES = [
    CallStyle("json", is_tagged=True),
    CallStyle("json", arguments_key="parameters"),
    CallStyle("xml", is_tagged=True),
    CallStyle("xml"),
    CallStyle("mistral_list"),
    CallStyle("mistral_args"),
    CallStyle("mistral_args", has_call_id=True),
]
THINK = Markers("<think>", "</think>")


def format_of(style: CallStyle, *, begins: bool = False, may: bool = False) -> AnswerFormat:
    """Return an answer's format."""
    return AnswerFormat(THINK if begins or may else None, begins, may, SCHEMAS, style)


def read(found: AnswerFormat, text: str, seed: int) -> list[Piece]:
    """Return the pieces of a text that comes in random pushes; whole, it must give the same."""
    cuts = random.Random(seed).choices(range(len(text) + 1), k=6)
    places = sorted({0, len(text), *cuts})
    results = []
    for pushes in ([text], list(text), [text[a:b] for a, b in pairwise(places)]):
        parser, pieces = found.parser(), []
        for piece in [one for push in pushes for one in parser.push(push)] + parser.flush():
            add_piece(pieces, piece)
        results.append(pieces)
    assert results[0] == results[1] == results[2]
    return results[0]


@pytest.mark.parametrize("style", STYLES, ids=str)
def test_forced_calls_are_read_and_valid(style: CallStyle) -> None:
    """Every text of the grammar is one or more calls, with arguments that the schemas allow."""
    found = format_of(style)
    wanted = RequestGrammar(found)
    wanted.add_calls(SCHEMAS, PARAMS, is_single=False)
    names = set()
    for seed in range(12):
        text = random_text(wanted.text(), seed)
        pieces = read(found, text, seed)
        assert pieces, text
        for piece in pieces:
            assert isinstance(piece, ToolCall), text
            jsonschema.validate(json.loads(piece.arguments), SCHEMAS[piece.name])
            names.add(piece.name)
    assert len(names) > 1


@pytest.mark.parametrize("style", STYLES, ids=str)
def test_single_call_is_single_and_may_follow_thoughts(style: CallStyle) -> None:
    """Open reasoning is closed first, reasoning that may open is optional; one call follows."""
    thinking = set()
    for seed in range(12):
        found = format_of(style, begins=seed % 2 == 0, may=seed % 2 == 1)
        wanted = RequestGrammar(found)
        one = {"weather": SCHEMAS["weather"]}
        wanted.add_calls(one, PARAMS, is_single=True)
        *thoughts, call = read(found, random_text(wanted.text(), seed), seed)
        assert isinstance(call, ToolCall)
        assert all(isinstance(piece, Reasoning) for piece in thoughts)
        thinking.add(bool(thoughts))
    assert True in thinking


def test_answer_or_calls() -> None:
    """With a form for the answer and tools that need not be called, it is either."""
    found = format_of(STYLES[0])
    kinds = set()
    for seed in range(20):
        wanted = RequestGrammar(found)
        wanted.of_answer('"yes"')
        wanted.add_calls(SCHEMAS, PARAMS, is_single=True)
        [piece] = read(found, random_text(wanted.text(), seed), seed)
        kinds.add(type(piece).__name__)
    assert kinds == {"Text", "ToolCall"}


def test_unknown_style_and_unwritable_schemas_are_refused() -> None:
    """What the model's form cannot hold is refused by name, not left out."""
    with pytest.raises(UnsupportedParameter, match="cannot be forced on this model"):
        RequestGrammar(format_of(CallStyle("unknown"))).add_calls(SCHEMAS, PARAMS, is_single=True)
    schema = {"properties": {"when": {"type": "string", "format": "date"}}}
    with pytest.raises(UnsupportedParameter, match=r"tools\[0\].*properties.when.format"):
        RequestGrammar(format_of(CallStyle("xml"))).add_calls(
            {"weather": schema}, PARAMS, is_single=True
        )
