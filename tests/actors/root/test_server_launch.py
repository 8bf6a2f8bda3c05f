"""Fork servers that run before the root does: which ones, and what ends them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from actors.root.server_launch import early_kinds, launch_early
from cortexd.settings import Settings, Supervision
from tests.waiting import DEADLINE_S

SPAWNED = Settings(supervision=Supervision(start_method="spawn"))


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        (Settings(role="all"), ("light", "engine")),
        (Settings(role="neuron"), ("light", "engine")),
        (Settings(role="gateway"), ("light",)),
        (SPAWNED, ()),
    ],
)
def test_servers_are_those_that_the_role_will_need(
    settings: Settings, kinds: tuple[str, ...]
) -> None:
    assert early_kinds(settings) == kinds


def test_servers_that_no_root_takes_over_end_with_the_lifeline(tmp_path: Path) -> None:
    """A root that cannot start leaves nothing behind."""
    early = launch_early(Settings(role="gateway"), ["actors.store:Store"], tmp_path)
    (server,) = early.launched.values()
    assert server.process.poll() is None
    early.lifeline.close()
    assert server.process.wait(DEADLINE_S) == -signal.SIGKILL
    for fd in (server.alive_fd, server.ready_fd, server.output_fd):
        os.close(fd)
