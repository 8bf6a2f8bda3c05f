"""The line locator agrees with tomllib about every key of every document."""

from __future__ import annotations

import datetime
import tomllib

import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexd.toml_lines import Path, key_lines

EXAMPLE = """\
title = "a [not.a.header]" # = comment
[gateway] # tail
  listen = "x"
"quoted \\u0041.key" = 'literal # no comment'
dotted . inner.deep = { a = 1, "b c" = [1, { x = 2 }], s = "}" }

[[neurons]]
name = '''
[fake]
key = 1'''
[[neurons]]
tags = [
  "one", # first ]

  [2, 3],
  { k = "v" },
]
[neurons.extra]
text = \"\"\"
fake = 1
"quotes" \\\"\"\" inside\"\"\"\"\"
[[neurons.parts]]
when = 1979-05-27 07:32:00Z
[[neurons.parts]]
[a.b.c]
v = +1e3
"""


def test_every_kind_of_key_has_its_line() -> None:
    """Headers, dotted and quoted keys, arrays over lines and inline tables are all found."""
    assert tomllib.loads(EXAMPLE)["neurons"][1]["extra"]["text"].endswith('inside""')
    assert key_lines(EXAMPLE) == {
        ("title",): 1,
        ("gateway",): 2,
        ("gateway", "listen"): 3,
        ("gateway", "quoted A.key"): 4,
        ("gateway", "dotted"): 5,
        ("gateway", "dotted", "inner"): 5,
        ("gateway", "dotted", "inner", "deep"): 5,
        ("gateway", "dotted", "inner", "deep", "a"): 5,
        ("gateway", "dotted", "inner", "deep", "b c"): 5,
        ("gateway", "dotted", "inner", "deep", "b c", 0): 5,
        ("gateway", "dotted", "inner", "deep", "b c", 1): 5,
        ("gateway", "dotted", "inner", "deep", "b c", 1, "x"): 5,
        ("gateway", "dotted", "inner", "deep", "s"): 5,
        ("neurons",): 7,
        ("neurons", 0): 7,
        ("neurons", 0, "name"): 8,
        ("neurons", 1): 11,
        ("neurons", 1, "tags"): 12,
        ("neurons", 1, "tags", 0): 13,
        ("neurons", 1, "tags", 1): 15,
        ("neurons", 1, "tags", 1, 0): 15,
        ("neurons", 1, "tags", 1, 1): 15,
        ("neurons", 1, "tags", 2): 16,
        ("neurons", 1, "tags", 2, "k"): 16,
        ("neurons", 1, "extra"): 18,
        ("neurons", 1, "extra", "text"): 19,
        ("neurons", 1, "parts"): 22,
        ("neurons", 1, "parts", 0): 22,
        ("neurons", 1, "parts", 0, "when"): 23,
        ("neurons", 1, "parts", 1): 24,
        ("a",): 25,
        ("a", "b"): 25,
        ("a", "b", "c"): 25,
        ("a", "b", "c", "v"): 26,
    }


def test_windows_line_ends_count_once() -> None:
    """A file with CRLF has the same lines as one with LF."""
    assert key_lines(EXAMPLE.replace("\n", "\r\n")) == key_lines(EXAMPLE)


_KEYS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6)
_SCALARS = (
    st.integers(-(2**63), 2**63 - 1)
    | st.booleans()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=12)
    | st.text("\"'\\\n[]{}#=, ", max_size=12)
    | st.datetimes(min_value=datetime.datetime(1000, 1, 1))
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=12,
)


def _paths(value: object, prefix: Path = ()) -> set[Path]:
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return set()
    here = {(*prefix, key) for key, _ in items}
    return here.union(*(_paths(item, (*prefix, key)) for key, item in items))


@given(st.dictionaries(_KEYS, _VALUES, max_size=4), st.booleans())
@settings(max_examples=150)
def test_any_document_yields_exactly_its_keys(document: dict[str, object], multiline: bool) -> None:
    """For whatever tomli-w writes, the locator finds the keys that tomllib reads."""
    text = tomli_w.dumps(document, multiline_strings=multiline)
    lines = key_lines(text)
    assert set(lines) == _paths(tomllib.loads(text))
    assert all(1 <= line <= text.count("\n") + 1 for line in lines.values())
