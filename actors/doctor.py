"""Tries tensor parallelism on this host without a model: spawn, ping, init, sanity, shutdown.

`cortexd doctor` runs it as the only light actor of a private tree. It starts one group of ranks,
collects what its rank 0 (`actors.leader:Probe`) finds, writes the findings to a file and ends the
tree. Nothing is restarted: the first failure is the finding.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from actors.actor import ActorContext, AsyncActor, handles
from actors.root.private_tree import NO_MODEL, run_private_tree
from actors.root.spec import ChildSpec
from cortexd.errors import Internal
from cortexd.messages import GroupDown, GroupUp, LoadProgress, StartGroup
from cortexd.messages.control import GroupStarting
from cortexd.messages.envelope import Envelope
from cortexd.models import LoadOptions, ModelFiles, RankArgs
from cortexd.settings import Settings

GROUP: Final = "doctor"
SHUTDOWN_STAGE: Final = "shutdown"
_REPORT: Final = "report.json"
_CONTROL_DEADLINE_S: Final = 10.0


class Report(msgspec.Struct, frozen=True):
    """What was found: one line for each stage, and the error that ended it."""

    lines: list[str]
    error: str | None = None


class DoctorArgs(msgspec.Struct, frozen=True):
    """What the doctor is told."""

    root_pid: int
    report_path: str
    world_size: int
    devices: tuple[int, ...] | None


class Doctor(AsyncActor):
    """See the module's text."""

    def __init__(self, context: ActorContext) -> None:
        super().__init__(context)
        self._args = msgspec.msgpack.decode(context.args, type=DoctorArgs)
        self._lines: list[str] = []
        self._is_done = False

    async def on_start(self) -> None:
        """Start the ranks."""
        options = LoadOptions(
            model_id=GROUP,
            tensor_parallel=self._args.world_size,
            devices=self._args.devices,
        )
        order = StartGroup(
            GROUP,
            "actors.leader:Probe",
            msgspec.msgpack.encode(RankArgs(options, _NO_FILES, NO_MODEL)),
            self._args.world_size,
            self.context.settings.supervision.start_timeout_s * 2,
            "actors.worker:Worker",
        )
        answer = await self.ask("root", order, deadline_s=_CONTROL_DEADLINE_S)
        assert isinstance(answer, GroupStarting), "StartGroup is answered by GroupStarting"
        self._lines.append(f"spawn: {self._args.world_size} ranks")

    @handles(LoadProgress)
    def on_finding(self, message: LoadProgress, envelope: Envelope) -> None:
        """Take a stage that has passed."""
        self._lines.append(message.stage)

    def on_group_up(self, up: GroupUp) -> None:
        """A single rank has nobody to shut down."""
        self._finish(None)

    def on_group_down(self, down: GroupDown) -> None:
        """The workers have ended after their goodbye, or something failed."""
        was_told = bool(self._lines) and self._lines[-1].startswith(SHUTDOWN_STAGE)
        if was_told and down.reason.endswith("exit code 0"):
            self._finish(None)
        else:
            self._finish(down.error.message if down.error else down.reason)

    def _finish(self, error: str | None) -> None:
        if self._is_done:
            return
        self._is_done = True
        Path(self._args.report_path).write_bytes(msgspec.json.encode(Report(self._lines, error)))
        os.kill(self._args.root_pid, signal.SIGTERM)


def examine(settings: Settings, world_size: int, devices: Sequence[int] | None) -> Report:
    """Run the trial in a tree of its own, in this process; return what was found.

    Raises: ConfigError when not even the tree can be started.
    """
    with tempfile.TemporaryDirectory(prefix="cortexd-doctor-") as folder:
        report = Path(folder) / _REPORT
        chosen = None if devices is None else tuple(devices)
        args = DoctorArgs(os.getpid(), str(report), world_size, chosen)
        child = ChildSpec(
            name="doctor", target="actors.doctor:Doctor", args=msgspec.msgpack.encode(args)
        )
        messages = run_private_tree(settings, child)
        if not report.exists():
            raise Internal(f"the trial ended without a result: {messages[-2000:]}")
        return msgspec.json.decode(report.read_bytes(), type=Report)


_NO_FILES: Final = ModelFiles(
    model_id=GROUP, source="path", revision="", format="safetensors", weights=()
)
