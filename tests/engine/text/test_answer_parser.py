"""Answers split into text, reasoning and tool calls, however they are cut into pushes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.text.answer import Piece, Reasoning, Text, ToolCall, add_piece
from engine.text.answer_format import answer_format
from engine.text.answer_parser import AnswerParser, Markers
from engine.text.call_style import CallStyle

THINK = Markers("<think>", "</think>")
TAGGED = CallStyle("json", is_tagged=True)
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
XML = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
F = ToolCall("f", '{"a": 1}')
F_TYPED = ToolCall("f", '{"a":1}')
SCHEMAS = {"f": {"properties": {"a": {"type": "integer"}}}}

# (answer, is_reasoning, pieces), with reasoning markers and tagged tools
CASES: list[tuple[str, bool, list[Piece]]] = [
    ("plain words\n", False, [Text("plain words\n")]),
    ("\n leading space stays", False, [Text("\n leading space stays")]),
    ("<think>\nhm\n</think>\n\nyes", False, [Reasoning("hm"), Text("yes")]),
    ("\n<think>hm</think>yes ", False, [Reasoning("hm"), Text("yes ")]),
    ("hm\n</think>\n\nyes", True, [Reasoning("hm"), Text("yes")]),
    ("\n\n</think>\n\nyes", True, [Text("yes")]),
    ("cut off in thou", True, [Reasoning("cut off in thou")]),
    ("a < b </thin", True, [Reasoning("a < b </thin")]),
    ("<think></think>", False, []),
    ("<think>a</think>\n<think>b</think>c", False, [Reasoning("ab"), Text("c")]),
    ("words <think> words", False, [Text("words <think> words")]),
    ("words </think> words", False, [Text("words </think> words")]),
    ("<thin air", False, [Text("<thin air")]),
    (CALL, False, [F]),
    (XML, False, [F_TYPED]),
    (f"<think>x</think>\n\n{CALL}\n", False, [Reasoning("x"), F]),
    (f"Look:\n\n{CALL}\n{XML}", False, [Text("Look:"), F, F_TYPED]),
    (f"{CALL}\n\nDone. \n", False, [F, Text("Done. \n")]),
    (f"a{CALL}b{CALL}c", False, [Text("a"), F, Text("b"), F, Text("c")]),
    (f"{CALL}\n<think>x</think>{CALL}", False, [F, Reasoning("x"), F]),
    ("a \n<tool_call>no</tool_call> b", False, [Text("a \n<tool_call>no</tool_call> b")]),
    ("<tool_call>no</tool_call>" + CALL, False, [Text("<tool_call>no</tool_call>"), F]),
    ('a\n<tool_call>{"name": "f"', False, [Text('a\n<tool_call>{"name": "f"')]),
    ('<tool_call>{"name": "f"}', False, [ToolCall("f", "{}")]),
    ("a <tool_cal", False, [Text("a <tool_cal")]),
    (f"<think>{CALL}</think>x", False, [Reasoning(CALL), Text("x")]),
    (f"{CALL}\n<tool", False, [F, Text("<tool")]),
    ("", False, []),
    (" \n", False, [Text(" \n")]),
    ("日本 🙂\n<think>", False, [Text("日本 🙂\n<think>")]),
]
BARE: list[tuple[str, list[Piece]]] = [
    ('\n{"name": "f", "parameters": {"a": 1}}', [F]),
    ('{"city": "Rome"}', [Text('{"city": "Rome"}')]),
    ('{"name": "f", "parameters": {"a": 1}} and more', []),
    ('Words {"name": "f", "parameters": {}}', [Text('Words {"name": "f", "parameters": {}}')]),
]

MISTRAL = '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]'
NAMED = '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]123456789[ARGS]{"s": "[TOOL_CALLS]"}'
BARE_XML = "<function=f>\n<parameter=a>\n1\n</parameter>\n</function>"
HOLDS_END = '<tool_call>{"name": "f", "arguments": {"a": "</tool_call> \\" {"}}</tool_call>'
# (style, answer, pieces): forms with other markers, and values that hold them
STYLED: list[tuple[CallStyle, str, list[Piece]]] = [
    (CallStyle("mistral_list"), MISTRAL, [F, ToolCall("g", "{}")]),
    (CallStyle("mistral_list"), f"Well.\n{MISTRAL} ", [Text("Well."), F, ToolCall("g", "{}")]),
    (CallStyle("mistral_list"), '[TOOL_CALLS] [{"name"', [Text('[TOOL_CALLS] [{"name"')]),
    (CallStyle("mistral_list"), "[TOOL_CALLS] no", [Text("[TOOL_CALLS] no")]),
    (CallStyle("mistral_args"), NAMED, [F, ToolCall("g", '{"s": "[TOOL_CALLS]"}')]),
    (CallStyle("mistral_args"), '[TOOL_CALLS]f{"a": 1}', [F]),
    (CallStyle("mistral_args"), "[TOOL_CALLS]f[ARGS]{", [Text("[TOOL_CALLS]f[ARGS]{")]),
    (CallStyle("xml"), BARE_XML, [F_TYPED]),
    (CallStyle("xml"), f"Look:\n{BARE_XML}\n{BARE_XML}", [Text("Look:"), F_TYPED, F_TYPED]),
    (CallStyle("xml"), f"{BARE_XML}\n</tool_call>\nso", [F_TYPED, Text("so")]),
    (CallStyle("xml"), "<function=f>no</function>", [Text("<function=f>no</function>")]),
    (CallStyle("xml"), "</tool_call> text", [Text("</tool_call> text")]),
    (CallStyle("xml", is_tagged=True), f"{XML}\n{BARE_XML}", [F_TYPED, F_TYPED]),
    (
        CallStyle("xml"),
        "<function=g><parameter=s>a</function>b</parameter></function>",
        [ToolCall("g", '{"s":"a</function>b"}')],
    ),
    (TAGGED, HOLDS_END, [ToolCall("f", '{"a": "</tool_call> \\" {"}')]),
    (TAGGED, '<tool_call>{"a\n"</tool_call>' + CALL, [Text('<tool_call>{"a\n"</tool_call>'), F]),
    (TAGGED, BARE_XML, [Text(BARE_XML)]),
]


def parser(*, is_reasoning: bool = False) -> AnswerParser:
    """Return a parser for a model with everything."""
    return AnswerParser(THINK, is_reasoning=is_reasoning, schemas=SCHEMAS, style=TAGGED)


def parse(subject: AnswerParser, pushes: list[str]) -> list[Piece]:
    """Return the joined pieces of a whole answer."""
    pieces: list[Piece] = []
    for text in pushes:
        for piece in subject.push(text):
            add_piece(pieces, piece)
    for piece in subject.flush():
        add_piece(pieces, piece)
    return pieces


@pytest.mark.parametrize(("answer", "is_reasoning", "expected"), CASES)
def test_parse_every_split_point_gives_the_same_pieces(
    answer: str, is_reasoning: bool, expected: list[Piece]
) -> None:
    """Whole, in two at each place, and character by character."""
    splits = [[answer[:cut], answer[cut:]] for cut in range(len(answer) + 1)]
    for pushes in [[answer], list(answer), *splits]:
        assert parse(parser(is_reasoning=is_reasoning), pushes) == expected, pushes


@pytest.mark.parametrize(("style", "answer", "expected"), STYLED)
def test_every_style_is_read_alike_however_it_is_cut(
    style: CallStyle, answer: str, expected: list[Piece]
) -> None:
    """Mistral's two forms, XML without markers, and end markers that stand inside a value."""
    for cut in range(len(answer) + 1):
        for pushes in ([answer[:cut], answer[cut:]], list(answer)):
            subject = AnswerParser(THINK, schemas=SCHEMAS, style=style)
            assert parse(subject, pushes) == expected, pushes


@given(
    style=st.sampled_from([style for style, _, _ in STYLED]),
    parts=st.lists(
        st.sampled_from(
            [MISTRAL, NAMED, BARE_XML, XML, CALL, HOLDS_END, "[TOOL_CALLS]", "</tool_call>"]
        )
        | st.text(alphabet='ab<[{"f\n ', max_size=5),
        max_size=6,
    ),
    cuts=st.lists(st.integers(0, 600), max_size=6),
)
def test_random_answers_of_every_style_do_not_depend_on_the_split(
    style: CallStyle, parts: list[str], cuts: list[int]
) -> None:
    """Streaming and unary answers have equal calls."""
    answer = "".join(parts)
    places = sorted({0, len(answer), *(min(cut, len(answer)) for cut in cuts)})
    results = [
        parse(AnswerParser(THINK, schemas=SCHEMAS, style=style), pushes)
        for pushes in ([answer], list(answer), [answer[a:b] for a, b in pairwise(places)])
    ]
    assert results[0] == results[1] == results[2]


@given(
    parts=st.lists(
        st.sampled_from(
            ["<think>", "</think>", CALL, XML, "<tool_call>", "</tool_call>", "{", "<", " ", "\n"]
        )
        | st.text(alphabet="ab<t\n ", max_size=5),
        max_size=8,
    ),
    cuts=st.lists(st.integers(0, 400), max_size=6),
    is_reasoning=st.booleans(),
)
def test_parse_random_answers_do_not_depend_on_the_split(
    parts: list[str], cuts: list[int], is_reasoning: bool
) -> None:
    """Markers in any order, cut anywhere."""
    answer = "".join(parts)
    places = sorted({0, len(answer), *(min(cut, len(answer)) for cut in cuts)})
    pushes = [answer[a:b] for a, b in pairwise(places)]
    whole = parse(parser(is_reasoning=is_reasoning), [answer])
    assert parse(parser(is_reasoning=is_reasoning), pushes) == whole
    assert parse(parser(is_reasoning=is_reasoning), list(answer)) == whole


@given(text=st.text(alphabet="ab<{}[\n ", max_size=30), cut=st.integers(0, 30))
def test_text_without_markers_is_kept_to_the_byte(text: str, cut: int) -> None:
    """Where no marker stands, nothing is trimmed or lost."""
    pieces = parse(parser(), [text[:cut], text[cut:]])
    assert "".join(piece.text for piece in pieces if isinstance(piece, Text)) == text


@pytest.mark.parametrize(("answer", "expected"), BARE)
def test_bare_json_call_is_the_whole_answer_or_none(answer: str, expected: list[Piece]) -> None:
    """Without markers a call is a JSON object and nothing else."""
    for cut in range(len(answer) + 1):
        subject = AnswerParser(None, schemas=SCHEMAS)
        pieces = parse(subject, [answer[:cut], answer[cut:]])
        assert pieces == (expected or [Text(answer)])


def test_text_is_not_held_longer_than_needed() -> None:
    """Only a possible marker and the space before it wait."""
    subject = parser()
    assert subject.push("Hello") == [Text("Hello")]
    assert subject.push(" \n<too") == []
    assert subject.push("th") == [Text(" \n<tooth")]


def test_is_reasoning_follows_the_answer() -> None:
    """The state counts reasoning tokens."""
    subject = parser()
    assert not subject.is_reasoning
    subject.push("<think>a")
    assert subject.is_reasoning
    subject.push("</think>")
    assert not subject.is_reasoning


def test_format_is_found_in_the_tokens_and_the_prompt() -> None:
    """Both tokens of a pair are needed; an open section at the prompt's end counts."""
    tools = [{"type": "function", "function": {"name": "f"}}]
    added = {"<think>", "</think>", "<tool_call>", "</tool_call>"}
    assert answer_format(set(), "prompt", None) is None
    assert answer_format({"<think>"}, "<think>\n", None) is None
    found = answer_format(added, "user: <think>\nassistant:", None)
    assert found is not None
    assert (found.reasoning, found.begins_in_reasoning, found.schemas) == (THINK, False, None)
    found = answer_format({"[THINK]", "[/THINK]"}, "x [THINK]\n", tools)
    assert found is not None
    assert (found.begins_in_reasoning, found.schemas) == (True, {"f": {}})
    assert found.style == CallStyle("json")
    assert found.parser().is_reasoning
    for tokens, prompt in ((added, ""), (set(), "call as <tool_call>{...}</tool_call>")):
        found = answer_format(tokens, prompt, tools)
        assert found is not None
        assert found.style == TAGGED
