"""How long a chat template may run, for whoever renders. Light: imports nothing of the templates.

A template is foreign code and may loop for ever. On an event loop even a second is too long, since
all streams wait: there a render is tried for a moment, and repeated in a thread when that is over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

# Of a render on an event loop; ordinary ones take well below a millisecond.
QUICK_S: Final = 0.05

_budget_s: ContextVar[float | None] = ContextVar("render_budget", default=None)


class SlowTemplateError(Exception):
    """A quick render ran out of its time; it may well succeed in a thread."""


@contextmanager
def quick_render() -> Iterator[None]:
    """Let renders inside raise SlowTemplateError after QUICK_S."""
    token = _budget_s.set(QUICK_S)
    try:
        yield
    finally:
        _budget_s.reset(token)


def quick_budget_s() -> float | None:
    """Return the seconds of a quick render, None when the render need not be quick."""
    return _budget_s.get()
