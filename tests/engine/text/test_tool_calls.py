"""Tool calls as models write them: what is read, how values are typed, what is no call."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.text.schema_types import coerce
from engine.text.tool_calls import parse_tool_call, schemas_of

SCHEMAS = {
    "f": {
        "properties": {
            "s": {"type": "string"},
            "i": {"type": "integer"},
            "n": {"type": "number"},
            "b": {"type": "boolean"},
            "o": {"type": "object"},
            "a": {"type": "array"},
            "u": {"type": ["integer", "null"]},
            "e": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
        }
    }
}


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', {"a": 1}),
        ('\n{"arguments": {"a": [1, "é"]}, "name": "f"}\n', {"a": [1, "é"]}),
        ('{"name": "f", "parameters": {"a": null}}', {"a": None}),
        ('{"name": "f", "arguments": "{\\"a\\": true}"}', {"a": True}),
        ('{"name": "f"}', {}),
        ('{"name": "f", "arguments": {"x": "</function>"}, "id": 7}', {"x": "</function>"}),
    ],
)
def test_json_call_is_read(body: str, arguments: dict[str, Any]) -> None:
    """Arguments as an object, as a string that holds one, under Llama's name, or none at all."""
    call = parse_tool_call(body, SCHEMAS)
    assert call is not None
    assert (call.name, json.loads(call.arguments)) == ("f", arguments)


def test_json_arguments_stay_as_the_model_wrote_them() -> None:
    """Digits and spaces are kept: numbers do not lose precision on the way."""
    call = parse_tool_call(
        '{"name":"f","arguments":{ "a": 1.10, "b": 12345678901234567890123}}', {}
    )
    assert call is not None
    assert call.arguments == '{ "a": 1.10, "b": 12345678901234567890123}'


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "words",
        "[]",
        '{"name": 5, "arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"arguments": {}}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "words"}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {"a": "\\ud800"}}',
        '{"name": "f", "arguments": {}} trailing',
        '{"name": "f", "arguments": {"a": ' + "[" * 50_000 + "}}",
        "<function=f>",
        "<function=f><parameter=s>1</function>",
        "<function=f>words</function>",
        "<function=><parameter=s>1</parameter></function>",
    ],
)
def test_what_is_no_call_is_refused(body: str) -> None:
    """Broken, nameless or cut off: no call."""
    assert parse_tool_call(body, SCHEMAS) is None


def test_xml_call_is_read_and_typed() -> None:
    """Qwen's XML: values take the declared type; line breaks beside the tags are layout."""
    body = """
<function=f>
<parameter=s>
12
</parameter>
<parameter=i>
7
</parameter>
<parameter=b>True</parameter>
<parameter=o>
{"k": [1, 2]}
</parameter>
<parameter=undeclared>
5
</parameter>
<parameter=x>
line one

  line <b>two</b>

</parameter>
</function>
"""
    call = parse_tool_call(body, SCHEMAS)
    assert call is not None
    assert call.name == "f"
    assert json.loads(call.arguments) == {
        "s": "12",
        "i": 7,
        "b": True,
        "o": {"k": [1, 2]},
        "undeclared": "5",
        "x": "line one\n\n  line <b>two</b>\n",
    }


@pytest.mark.parametrize(
    ("value", "key", "expected"),
    [
        ("12", "s", "12"),
        (" 12 ", "i", 12),
        ("12.0", "i", 12),
        ("12.5", "i", "12.5"),
        ("true", "i", "true"),
        ("1e3", "n", 1000.0),
        ("many", "n", "many"),
        ("false", "b", False),
        ("1", "b", "1"),
        ("[1]", "a", [1]),
        ("[1]", "o", "[1]"),
        ("{broken", "o", "{broken"),
        ("null", "u", None),
        ("None", "u", None),
        ("3", "u", 3),
        ("x", "u", "x"),
        ("5", "e", 5),
        ("five", "e", "five"),
        ("\ud800", "i", "\ud800"),
    ],
)
def test_coerce_falls_back_to_the_string(value: str, key: str, expected: object) -> None:
    """A value that is not of its declared type stays what was written."""
    assert coerce(value, SCHEMAS["f"]["properties"][key]) == expected
    assert type(coerce(value, SCHEMAS["f"]["properties"][key])) is type(expected)


@given(
    value=st.text(),
    schema=st.recursive(
        st.none() | st.sampled_from(["string", "integer", "nonsense", 5]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["type", "anyOf", "oneOf"]), inner)
        ),
        max_leaves=6,
    ),
)
def test_coerce_any_schema_is_survived(value: str, schema: object) -> None:
    """Schemas come from clients: any JSON value is one."""
    coerce(value, schema)


def test_schemas_of_reads_openai_definitions() -> None:
    """Name to parameters; a function without parameters has an empty schema."""
    tools = [
        {"type": "function", "function": {"name": "a", "parameters": {"type": "object"}}},
        {"type": "function", "function": {"name": "b"}},
    ]
    assert schemas_of(tools) == {"a": {"type": "object"}, "b": {}}
