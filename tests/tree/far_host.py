"""A host of its own: a network namespace joined to this one by a cable that can be pulled.

Pulled at its far end, packets are lost on the way, connections stay as they are and nobody is told.
It needs the right to make namespaces and network devices; without it, tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.tree.daemon import NeuronDaemon
from tests.waiting import wait_for

# Of the network set aside for measuring devices (RFC 2544), four addresses for each process.
_SUBNET = "198.18.{}.{}"
_PROGRAMS = ("unshare", "nsenter", "ip")


@dataclass(slots=True)
class FarHost:
    """The namespace lives as long as the process that holds it; the cable goes with it."""

    address: str = ""
    _holder: subprocess.Popen[bytes] = field(init=False)

    def __enter__(self) -> Self:
        missing = [name for name in _PROGRAMS if shutil.which(name) is None]
        if missing:
            pytest.skip(f"needs {', '.join(missing)} to make a network namespace")
        block, first = os.getpid() >> 6 & 255, (os.getpid() & 63) * 4
        near_address, self.address = (_SUBNET.format(block, first + n) for n in (1, 2))
        near = f"cx-{os.getpid()}"
        self._holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        try:
            wait_for(self._has_own_network, "a network namespace")
            _run(f"ip link add {near} type veth peer name far netns {self._holder.pid}")
            _run(f"ip addr add {near_address}/30 dev {near}")
            _run(f"ip link set {near} up")
            self.run(f"ip addr add {self.address}/30 dev far")
            self.run("ip link set lo up")
            self.mend()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    @property
    def command_prefix(self) -> tuple[str, ...]:
        """Return what runs a command on this host."""
        return ("nsenter", f"--net=/proc/{self._holder.pid}/ns/net")

    def run(self, command: str) -> None:
        """Run a command there."""
        _run(" ".join([*self.command_prefix, command]))

    def cut(self) -> None:
        """Lose all packets from now on."""
        self.run("ip link set far down")

    def mend(self) -> None:
        """Let packets through again."""
        self.run("ip link set far up")

    def _has_own_network(self) -> bool:
        if self._holder.poll() is not None:
            pytest.skip("needs the right to make network namespaces (unshare --net)")
        own, its = (Path(f"/proc/{pid}/ns/net") for pid in ("self", self._holder.pid))
        return own.readlink() != its.readlink()

    def _end(self) -> None:
        self._holder.kill()
        self._holder.wait()


class FarNeuron(NeuronDaemon):
    """A neuron on another host."""

    def __init__(self, root: Path, far: FarHost, *arguments: str) -> None:
        super().__init__(root, "--role", "neuron", *arguments)
        self.host, self.command_prefix = far.address, far.command_prefix
        self.environment["CORTEXD_NEURON__LISTEN"] = f"{far.address}:{self.neuron_port}"

    @property
    def neuron_url(self) -> str:
        """Return where gateways find it."""
        return f"http://{self.host}:{self.neuron_port}"


def _run(command: str) -> None:
    found = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if "not permitted" in found.stderr.lower():
        pytest.skip(f"needs the right to make network devices: {found.stderr.strip()}")
    assert found.returncode == 0, f"{command}: {found.stderr}"
