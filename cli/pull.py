"""`cortexd pull`: bring a model's files to disk, through the daemon when it runs, else directly.

Through the daemon a pull joins a download that is already going on. Progress is a bar on a
terminal and a line now and then elsewhere.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from cli import control
from cli import format as fmt
from cli.control import Document, connected, settings_of, wait_for_operation
from cli.exit_code import OK
from cli.models import given_model_id, progress_text
from cortexd.paths import cache_dir
from cortexd.settings import Settings

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

_LINE_PERIOD_S: Final = 2.0  # between progress lines where there is no terminal
Report = Callable[[str, int, int], None]  # stage, bytes so far, bytes in all (0 = unknown)


def pull(args: argparse.Namespace) -> int:
    """Fetch a model; return when its files are complete. Raises: what the fetch failed with."""
    model_id = given_model_id(args.model_id)
    settings = settings_of(args).settings
    fetch = _pull_through_daemon if control.is_running(settings) else _pull_directly
    with _progress(model_id) as report:
        files = fetch(settings, model_id, args.quant, report)
    print(f"{model_id}: {fmt.size(_size(files))}, {_first_weight(files)}")
    return OK


def _pull_through_daemon(
    settings: Settings, model_id: str, quant: str | None, report: Report
) -> Document:
    def on_progress(progress: Document) -> None:
        done, total = progress.get("done_bytes"), progress.get("total_bytes")
        report(
            str(progress.get("stage") or "downloading"),
            done if isinstance(done, int) else 0,
            total if isinstance(total, int) else 0,
        )

    options: Document = {"model_id": model_id}
    if quant is not None:
        options["quant"] = quant
    with connected(settings) as channel:
        accepted = channel.request("model.pull", options)
        return wait_for_operation(channel, accepted, on_progress)


def _pull_directly(
    settings: Settings, model_id: str, quant: str | None, report: Report
) -> Document:
    """Run the source in a thread, so that Ctrl-C cancels it and it can clean up after itself."""
    from concurrent.futures import ThreadPoolExecutor

    from engine.sources import resolve

    cancel = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(
            resolve, model_id, quant, settings.store, cache_dir(settings.store), report, cancel
        )
        try:
            files = task.result()
        except KeyboardInterrupt:
            cancel.set()
            raise
    return {"size_bytes": files.size_bytes, "weights": list(files.weights)}


@contextmanager
def _progress(model_id: str) -> Iterator[Report]:
    if sys.stderr.isatty():
        with _bar(model_id) as report:
            yield report
    else:
        yield progress_lines(model_id, time.monotonic)


@contextmanager
def _bar(model_id: str) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _bar_report(bar, model_id)


def _bar_report(bar: RichProgress, model_id: str) -> Report:
    task = bar.add_task(model_id, total=None)

    def report(stage: str, done: int, total: int) -> None:
        bar.update(task, description=f"{model_id} {stage}", completed=done, total=total or None)

    return report


def progress_lines(model_id: str, clock: Callable[[], float]) -> Report:
    """Return a report that writes a line per stage, and one per period within a stage."""
    last_stage = ""
    last_time = clock()

    def report(stage: str, done: int, total: int) -> None:
        nonlocal last_stage, last_time
        now = clock()
        if stage == last_stage and now - last_time < _LINE_PERIOD_S:
            return
        last_stage, last_time = stage, now
        text = progress_text({"stage": stage, "done_bytes": done, "total_bytes": total})
        print(f"{model_id}: {text}", file=sys.stderr, flush=True)

    return report


def _size(files: Document) -> int:
    size = files.get("size_bytes")
    return size if isinstance(size, int) else 0


def _first_weight(files: Document) -> str:
    weights = files.get("weights")
    return str(weights[0]) if isinstance(weights, list) and weights else "no weights"
