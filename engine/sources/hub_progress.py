"""A progress bar for the hub's client that draws nothing and reports to a `Transfer`.

The client makes one bar per file and updates it after each chunk. An update is also where a
cancelled or late fetch ends; a download through the client's native transfer may only notice at the
end of the file.
"""

from __future__ import annotations

from typing import Any

from engine.sources.transfer import Transfer


def progress_bar_class(transfer: Transfer, done_before: int, total: int) -> type[Any]:
    """Return a bar class for one file, `done_before` bytes of `total` being there already."""

    furthest = 0  # one file may have two bars: bytes received and bytes put together

    class ReportingBar:
        """The part of a progress bar's interface that the client uses."""

        format_dict: dict[str, Any] = {}

        def __init__(self, *_: Any, initial: int = 0, **attributes: Any) -> None:
            self.n = initial
            self.total = attributes.get("total")

        def __enter__(self) -> ReportingBar:
            return self

        def __exit__(self, *_: object) -> None:
            self.close()

        def update(self, num_bytes: float | None = 1) -> None:
            """Count a chunk, report it, end the fetch when it must."""
            nonlocal furthest
            self.n += int(num_bytes or 0)
            furthest = max(furthest, min(done_before + self.n, total))
            transfer.report("downloading", furthest, total)

        def refresh(self, *_: Any, **__: Any) -> None:
            """Nothing is drawn."""

        def reset(self, total: int | None = None) -> None:
            """Start over, as after a retry."""
            self.n, self.total = 0, total

        def close(self) -> None:
            """Nothing is held."""

        def set_description(self, *_: Any, **__: Any) -> None:
            """Nothing is drawn."""

        set_description_str = set_postfix = set_postfix_str = set_description

    return ReportingBar
