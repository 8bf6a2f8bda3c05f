"""The table is whole, and nothing in it is claimed that no test proves."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases.case import DIALECTS
from tests.cases.table import CASES

_FOLDER = Path(__file__).parent
_ROOT = _FOLDER.parents[1]
# Tests of this folder name their row in their parameters or, where they have none, in their name.
_ROW = re.compile(r"\[case(?P<row>\d\d)-(?P<dialect>openai|anthropic)|::test_case_(?P<plain>\d\d)_")


def collected(targets: list[str]) -> list[str]:
    """Return what pytest collects of these targets; one that is not there fails."""
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", *targets],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        timeout=100,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr
    return found.stdout.splitlines()


@pytest.fixture(scope="module")
def proven() -> set[tuple[int, str]]:
    """The rows that tests of this folder bear, with the dialect, "" for those of none."""
    files = [str(path) for path in sorted(_FOLDER.glob("test_*.py"))]
    rows = [row for test in collected(files) if (row := _ROW.search(test)) is not None]
    return {(int(row["row"] or row["plain"]), row["dialect"] or "") for row in rows}


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
    """Each test that a row names is collected under that name."""
    proofs = sorted({proof for case in CASES.values() for proof in case.proofs})
    tests = {test.partition("[")[0] for test in collected(proofs)}
    assert [proof for proof in proofs if proof not in tests] == []
