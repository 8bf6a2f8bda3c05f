"""What the router or an engine refuses a request with, as each dialect tells it over HTTP.

That they refuse with these errors when they should is proven by the tests that the table names.
"""

from __future__ import annotations

from typing import Final

import pytest

from cortexd.errors import (
    CortexError,
    EngineRestarting,
    InsufficientDisk,
    ModelLoadFailed,
    ModelLoading,
    ModelNotFeasible,
    NoHealthyNode,
    Overloaded,
    QueueTimeout,
)
from cortexd.settings import NeuronEntry
from tests.cases.case import DIALECTS, PATHS, DialectName, check_answer
from tests.cases.table import CASES
from tests.doubles.front import async_test, chat_body, served_front

REFUSALS: Final[dict[int, CortexError]] = {
    7: ModelNotFeasible("no node can ever hold it"),
    8: NoHealthyNode("its node does not answer", retry_after_s=3),
    19: Overloaded("256 requests wait already", retry_after_s=4.2),
    20: QueueTimeout("no seat became free", retry_after_s=2),
    23: ModelLoading("it is loading", retry_after_s=17, progress=0.4, eta_s=17.0),
    26: ModelLoadFailed("the file is truncated", retry_after_s=10),
    27: ModelLoadFailed("no progress for 120 s", retry_after_s=10),
    43: NoHealthyNode("its node is held down", retry_after_s=9),
    51: InsufficientDisk("/models has 3 GiB and 20 GiB are needed"),
    52: EngineRestarting("the engine of this model ended (poisoned)"),
}
ROLES: Final = {"host": [], "gateway": [NeuronEntry(name="a", endpoint="http://a")]}


@pytest.mark.parametrize(
    ("number", "dialect", "role"),
    [
        pytest.param(number, dialect, role, id=f"case{number:02}-{dialect}-{role}")
        for number in REFUSALS
        for dialect in DIALECTS
        for role in ROLES
    ],
)
@async_test
async def test_refusal_is_told(number: int, dialect: DialectName, role: str) -> None:
    """Status, envelope and hint, streaming (before a byte is out) or not; nothing is submitted."""
    error = REFUSALS[number]
    async with served_front(neurons=ROLES[role], unary_load_wait_s=0.0) as front:
        front.fleet.load_error = error
        for stream in (False, True):
            if stream and isinstance(error, ModelLoading | EngineRestarting):
                continue  # a stream waits for these: case 22
            body = chat_body(max_tokens=4, stream=stream)
            status, document, headers = await front.post(PATHS[dialect], body)
            check_answer(CASES[number], dialect, status, document, headers)
            assert error.message in document["error"]["message"]
            if error.retry_after_s is not None:
                assert 0 <= int(headers["Retry-After"]) - error.retry_after_s < 1
            if number == 23 and dialect == "openai":
                assert (document["error"]["progress"], document["error"]["eta_s"]) == (0.4, 17.0)
        assert front.fleet.submits == []


@pytest.mark.parametrize("dialect", [pytest.param(each, id=f"case20-{each}") for each in DIALECTS])
@async_test
async def test_wait_in_the_engine_is_told(dialect: DialectName) -> None:
    """A request that finds no KV memory in time: 503 and hint, with the figures of the engine."""
    text = "it needs 5000 bytes of KV memory, 3000 of 10000 are free; send a shorter prompt"
    figures = {"needed_bytes": 5000, "available_bytes": 3000, "limit_bytes": 10000}
    async with served_front() as front:
        front.fleet.delta_error = QueueTimeout(text, retry_after_s=5.0, **figures)
        for stream in (False, True):
            body = chat_body(max_tokens=4, stream=stream)
            status, document, headers = await front.post(PATHS[dialect], body)
            check_answer(CASES[20], dialect, status, document, headers)
            assert document["error"]["message"] == text
            assert headers["Retry-After"] == "5"
            if dialect == "openai":
                assert figures.items() <= document["error"].items()
