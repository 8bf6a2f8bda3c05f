"""The table is whole, and nothing in it is claimed that no test proves."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from tests.cases.case import DIALECTS
from tests.cases.table import CASES

_FOLDER = Path(__file__).parent
_ROOT = _FOLDER.parents[1]
# Tests of this folder name their row in their parameters or, where they have none, in their name.
_PARAMETER = re.compile(r"case(\d\d)-(openai|anthropic)")
_NAME = re.compile(r"test_case_(\d\d)_")


@cache
def names_in(path: str) -> set[str]:
    """Return the names of the tests that pytest collects from a file."""
    if not Path(path).name.startswith("test_") or not (_ROOT / path).is_file():
        return set()
    body = ast.parse((_ROOT / path).read_text()).body
    functions = [node for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {function.name for function in functions if function.name.startswith("test_")}


def parameter_ids(module: ModuleType) -> Iterator[str]:
    """Yield the ids of all parameters of a module's tests."""
    for name in names_in(f"tests/cases/{module.__name__.rpartition('.')[2]}.py"):
        for mark in getattr(getattr(module, name), "pytestmark", []):
            if mark.name == "parametrize":
                yield from mark.kwargs.get("ids") or []
                yield from (getattr(value, "id", None) or "" for value in mark.args[1])


@pytest.fixture(scope="module")
def proven() -> set[tuple[int, str]]:
    """The rows that tests of this folder bear, with the dialect, "" for those of none."""
    rows: set[tuple[int, str]] = set()
    for path in _FOLDER.glob("test_*.py"):
        module = importlib.import_module(f"tests.cases.{path.stem}")
        found = [_PARAMETER.match(name) for name in parameter_ids(module)]
        rows |= {(int(row[1]), row[2]) for row in found if row is not None}
        names = [_NAME.match(name) for name in names_in(f"tests/cases/{path.name}")]
        rows |= {(int(name[1]), "") for name in names if name is not None}
    return rows


def test_every_case_has_its_row() -> None:
    """1 to 56, each once, each said in words."""
    assert sorted(CASES) == list(range(1, 57))
    assert all(case.name and case.expected for case in CASES.values())


def test_every_answer_is_proven_here_in_its_dialect(proven: set[tuple[int, str]]) -> None:
    """A row that says what a dialect answers has a test that asks in that dialect."""
    for number, case in CASES.items():
        for dialect in DIALECTS:
            if (case.openai if dialect == "openai" else case.anthropic) is not None:
                assert (number, dialect) in proven, f"case {number}, {dialect}"


def test_every_case_is_proven_somewhere(proven: set[tuple[int, str]]) -> None:
    """By tests here or by those it names, and no test here bears a row that is not there."""
    here = {number for number, _ in proven}
    assert here <= set(CASES)
    assert [number for number in CASES if number not in here and not CASES[number].proofs] == []


def test_named_proofs_exist() -> None:
    """Each test that a row names is there under that name."""
    proofs = {proof.partition("::")[::2] for case in CASES.values() for proof in case.proofs}
    assert [(path, name) for path, name in sorted(proofs) if name not in names_in(path)] == []
