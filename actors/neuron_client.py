"""HTTP to the remote neurons: polls, loads, unloads. Owned by the poller actor.

Each neuron has its own task, so that one that hangs delays no other. Three misses in a row make it
unhealthy, the first success healthy again; between the two its last devices and models stand.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import Callable
from typing import Final

import aiohttp
import msgspec

from cortexd.errors import (
    DeadlineExceeded,
    NoHealthyNode,
    NotFound,
)
from cortexd.keys import node_keys
from cortexd.messages import NeuronReport
from cortexd.messages.neurons import NodeDevice, NodeModel
from cortexd.models import LoadOptions, ModelPolicy
from cortexd.neuron_list import base_url
from cortexd.neuron_wire import (
    BadAnswer,
    answered_error,
    is_draining,
    read_devices,
    read_models,
    read_openai_models,
    with_load,
)
from cortexd.settings import NeuronEntry

_PERIOD_S: Final = 1.0
_ANSWER_TIMEOUT_S: Final = 3.0
# For what a node can be used without; within the time above, so that it costs no poll.
_OPTIONAL_TIMEOUT_S: Final = 2.0
_CONNECT_TIMEOUT_S: Final = 2.0
_MAX_MISSES: Final = 3
_MAX_ANSWER_BYTES: Final = 8 * 2**20
_KEY_REFUSED: Final = frozenset({401, 403})
_UNAVAILABLE: Final = 503
# A load is as long as its download and its bytes ask for; the neuron ends one that stalls.
_LOAD_TIMEOUT_S: Final = 24 * 3600.0
_UNLOAD_TIMEOUT_S: Final = 600.0

_PollError = (aiohttp.ClientError, TimeoutError, OSError, BadAnswer)


class NeuronClient:
    """Polls all neurons and tells `on_report` what each poll saw."""

    def __init__(
        self, neurons: list[NeuronEntry], on_report: Callable[[NeuronReport], None]
    ) -> None:
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
            connector=aiohttp.TCPConnector(limit=0),
        )
        keys = node_keys(neurons)
        self._neurons = {
            entry.name: _PolledNeuron(entry, keys.get(entry.name), self._session, on_report)
            for entry in neurons
        }
        self._tasks = [
            asyncio.create_task(neuron.poll_forever()) for neuron in self._neurons.values()
        ]

    def reports(self) -> list[NeuronReport]:
        """Return the last report of each neuron that has one."""
        return [neuron.report for neuron in self._neurons.values() if neuron.report is not None]

    async def load(self, node: str, options: LoadOptions, policy: ModelPolicy | None) -> None:
        """Load a model at a neuron. Raises: what the neuron answers, NoHealthyNode, NotFound."""
        wanted = msgspec.to_builtins(options)
        if policy is not None:
            wanted |= msgspec.to_builtins(policy)
        await self._post(node, "/models/load", msgspec.json.encode(wanted), _LOAD_TIMEOUT_S)
        await self._refresh(node)

    async def unload(self, node: str, model_id: str, *, force: bool) -> None:
        """Unload a model at a neuron. Raises: what the neuron answers, NoHealthyNode, NotFound."""
        body = msgspec.json.encode({"model_id": model_id, "force": force})
        await self._post(node, "/models/unload", body, _UNLOAD_TIMEOUT_S)
        await self._refresh(node)

    async def close(self) -> None:
        """End the polls and close the connections."""
        for task in self._tasks:
            task.cancel()
        await self._session.close()

    async def _refresh(self, node: str) -> None:
        await self._neurons[node].poll()

    async def _post(self, node: str, path: str, body: bytes, timeout_s: float) -> None:
        neuron = self._neurons.get(node)
        if neuron is None or neuron.entry.kind != "cortex":
            raise NotFound(f'no neuron "{node}" that loads models is configured')
        try:
            async with asyncio.timeout(timeout_s):
                async with self._session.post(
                    neuron.url + path,
                    data=body,
                    headers={"Content-Type": "application/json", **neuron.headers},
                ) as response:
                    answer = await _read(response)
                    if response.status != 200:
                        raise answered_error(node, response.status, answer)
        except TimeoutError:
            raise DeadlineExceeded(f'node "{node}" did not answer {path} in time') from None
        except (aiohttp.ClientError, OSError, BadAnswer) as error:
            raise NoHealthyNode(f'node "{node}" failed at {path}: {_reason(error)}') from None


class _PolledNeuron:
    """One neuron: its last answers, and how many polls it has missed since."""

    def __init__(
        self,
        entry: NeuronEntry,
        key: str | None,
        session: aiohttp.ClientSession,
        on_report: Callable[[NeuronReport], None],
    ) -> None:
        self.entry = entry
        self.url = base_url(entry)
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.report: NeuronReport | None = None
        self._session = session
        self._on_report = on_report
        self._devices: list[NodeDevice] | None = None
        self._models: list[NodeModel] = []
        self._is_draining = False
        self._num_misses = 0
        self._num_successes = 0
        self._sequence = 0
        self._polling = asyncio.Lock()

    async def poll_forever(self) -> None:
        """Poll once a period, at times that differ between gateways."""
        while True:
            await self.poll()
            await asyncio.sleep(_PERIOD_S * random.uniform(0.9, 1.1))

    async def poll(self) -> None:
        """Poll once and tell what was seen."""
        async with self._polling:
            self._sequence += 1
            error: str | None = None
            try:
                async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                    if self.entry.kind == "openai":
                        await self._look_at_server()
                    else:
                        await self._look_at_neuron()
            except _PollError as failure:
                error = _reason(failure)
            self._count(error)

    def _count(self, error: str | None) -> None:
        if error is None:
            self._num_misses = 0
            self._num_successes += 1
        else:
            self._num_misses += 1
        is_healthy = self._num_successes > 0 and self._num_misses < _MAX_MISSES
        if not is_healthy:
            self._devices = None  # it may come back as another machine
        last = self.report.devices if self.report is not None else []
        self.report = NeuronReport(
            name=self.entry.name,
            kind=self.entry.kind,
            base_url=self.url,
            is_healthy=is_healthy,
            sequence=self._sequence,
            num_successes=self._num_successes,
            devices=self._devices if self._devices is not None else last,
            models=self._models,
            error=error,
            is_draining=self._is_draining,
        )
        self._on_report(self.report)

    async def _look_at_neuron(self) -> None:
        """Read models, load and, until it is known, hardware; only models are indispensable.

        A neuron that starts answers before it knows its devices. It is given the time to: without
        them it would be taken for one that can hold nothing.
        """
        models_body, health_body, discovery_body = await asyncio.gather(
            self._get("/models"),
            self._get_optional("/health"),
            self._get_optional("/discovery") if self._devices is None else _nothing(),
        )
        models = read_models(models_body)
        devices = self._devices or []
        if discovery_body is not None:
            with contextlib.suppress(BadAnswer):
                devices = read_devices(discovery_body)
        if not devices and self._num_successes == 0 and self._num_misses < _MAX_MISSES - 1:
            raise BadAnswer("/discovery tells no devices yet")
        if health_body is not None:
            with contextlib.suppress(BadAnswer):
                devices, models = with_load(health_body, devices, models)
                self._is_draining = is_draining(health_body)
        self._models = models
        if devices:
            self._devices = devices

    async def _look_at_server(self) -> None:
        """Read the models of an OpenAI-compatible server; many answer 503 while they load."""
        models_body, status = await asyncio.gather(self._get("/v1/models"), self._status("/health"))
        self._models = read_openai_models(models_body, is_ready=status != _UNAVAILABLE)

    async def _get(self, path: str) -> bytes:
        async with self._session.get(self.url + path, headers=self.headers) as response:
            if response.status != 200:
                is_key = response.status in _KEY_REFUSED
                hint = "; set key_file in [[neurons]] to a key that it knows" if is_key else ""
                raise BadAnswer(f"{path} answered HTTP {response.status}{hint}")
            return await _read(response)

    async def _get_optional(self, path: str) -> bytes | None:
        try:
            async with asyncio.timeout(_OPTIONAL_TIMEOUT_S):
                return await self._get(path)
        except _PollError:
            return None

    async def _status(self, path: str) -> int:
        try:
            async with (
                asyncio.timeout(_OPTIONAL_TIMEOUT_S),
                self._session.get(self.url + path, headers=self.headers) as response,
            ):
                return response.status
        except (aiohttp.ClientError, TimeoutError, OSError):
            return 0


async def _nothing() -> bytes | None:
    return None


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """Return the whole body. Raises: BadAnswer when it is too long to be one."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > _MAX_ANSWER_BYTES:
            raise BadAnswer(f"the answer is over {_MAX_ANSWER_BYTES} bytes")
    return bytes(body)


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {_ANSWER_TIMEOUT_S:g} s"
    is_tls = isinstance(error, aiohttp.ClientSSLError)
    if isinstance(error, aiohttp.ClientConnectorError) and not is_tls:
        # The library's own words speak of TLS where there is none. Lookups count from below 0.
        number, text = error.os_error.errno or 0, error.os_error.strerror
        return f"cannot connect: {os.strerror(number) if number > 0 else text}"
    return str(error) or type(error).__name__
