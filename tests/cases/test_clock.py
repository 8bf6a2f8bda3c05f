"""Case 45: no duration or deadline goes by a clock that people set."""

from __future__ import annotations

import ast
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_WALL_CLOCKS = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today"}
# Where a moment is told to people or clients, or must be known after a restart of the host.
_ALLOWED = {
    "actors/budgets.py",  # windows of the ledger file; within a run from a monotonic base
    "actors/root/events.py",
    "actors/front/inference.py",  # `created` of an answer
    "actors/front/written.py",  # the Date header
    "cortexd/log.py",  # when a line was written
    "actors/front/services.py",  # `created` of a relayed answer
    "actors/root/logs.py",
    "actors/router/managed_model.py",  # `loaded_at` as it is shown
    "engine/text/template_sandbox.py",  # the date that a chat template asks for
}


def wall_clock_calls(path: Path) -> list[str]:
    """Return the wall clocks that a file reads."""
    calls = [
        node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
    ]
    names = [ast.unparse(call) for call in calls]
    return [name for name in names if name in _WALL_CLOCKS or name.endswith(".datetime.now")]


def test_case_45_only_what_is_shown_reads_the_wall_clock() -> None:
    """A new reader of it has to say here what for."""
    files = [
        path for top in ("actors", "cortexd", "engine") for path in (_ROOT / top).rglob("*.py")
    ]
    assert len(files) > 200
    readers = {path.relative_to(_ROOT).as_posix() for path in files if wall_clock_calls(path)}
    assert readers == _ALLOWED
