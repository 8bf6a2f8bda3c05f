"""Requests that are refused for what they are: the same in both dialects, here and at a gateway."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from cortexd.errors import ModelNotFound, WrongModality
from cortexd.keys import Key, Window, key_digest
from cortexd.log import JsonFormatter
from cortexd.messages import Route
from cortexd.settings import NeuronEntry
from tests.cases.case import DIALECTS, PATHS, DialectName, check_answer
from tests.cases.table import CASES
from tests.doubles.fleet import MODEL
from tests.doubles.front import async_test, chat_body, served_front

NEURONS = [NeuronEntry(name="a", endpoint="http://a")]
DEEP = b"[" * 10_000 + b"]" * 10_000
EVIL = "no/such\n\x1b[31mmodel\r\u2028"


@dataclass(frozen=True, slots=True)
class Row:
    """One bad request. `raw` is sent as it is, `fields` change a good one (None leaves one out)."""

    number: int
    label: str
    fields: dict[str, Any] = field(default_factory=dict)
    raw: bytes | None = None
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    dialects: tuple[DialectName, ...] = DIALECTS
    gateway: dict[str, Any] = field(default_factory=dict)

    def body(self) -> bytes:
        """Return the bytes to send."""
        if self.raw is not None:
            return self.raw
        good = chat_body(max_tokens=4) | self.fields
        return msgspec.json.encode({key: good[key] for key in good if good[key] is not None})


SMALL = {"max_body_mib": 1}
ROWS = [
    Row(1, "empty", raw=b""),
    Row(1, "cut-off", raw=b'{"model":'),
    Row(1, "text", raw=b"model=x&messages=y"),
    Row(2, "list", raw=b"[]"),
    Row(2, "null", raw=b"null"),
    Row(2, "type-of-model", {"model": 5}, param="model"),
    Row(2, "type-of-messages", {"messages": "hi"}, param="messages"),
    Row(2, "type-of-limit", {"max_tokens": "many"}, param="max_tokens"),
    Row(2, "nan", raw=b'{"model": "m", "max_tokens": NaN}', code="invalid_json"),
    Row(2, "deep", raw=b'{"unknown": ' + DEEP + b"}", code="invalid_json"),
    Row(2, "deep-list", raw=DEEP),
    Row(3, "huge-integer", {"max_tokens": 2**63 - 1, "top_k": 2**40}, code="invalid_value"),
    Row(3, "lone-surrogate", raw=b'{"model": "\\ud800"}'),
    Row(3, "no-utf8", raw=b'{"model": "\xff"}'),
    Row(4, "no-model", {"model": None}, param="model"),
    Row(5, "no-limit", {"max_tokens": None}, param="max_tokens", dialects=("anthropic",)),
    Row(6, "unknown", {"model": "no/such"}, param="model"),
    Row(10, "declared", raw=b" " * (2**20 + 1), gateway=SMALL),
    Row(
        14,
        "bomb",
        raw=gzip.compress(b" " * (64 * 2**20)),
        headers={"Content-Encoding": "gzip"},
        gateway=SMALL,
    ),
    Row(21, "long", {"messages": [{"role": "user", "content": "x" * 500}]}),
    Row(55, "random", {"model": "attack/of-random-labels"}),
    Row(56, "escapes", {"model": EVIL}),
]
PARAMETERS = [
    pytest.param(row, dialect, at, id=f"case{row.number:02}-{dialect}-{row.label}-{at}")
    for row in ROWS
    for dialect in row.dialects
    for at in ("host", "gateway")
]


@pytest.mark.parametrize(("row", "dialect", "at"), PARAMETERS)
def test_request_is_refused(
    row: Row, dialect: DialectName, at: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its row's answer, streaming or not; the engine hears nothing, the log keeps one line each."""
    caplog.set_level("INFO")

    @async_test
    async def run() -> None:
        neurons = NEURONS if at == "gateway" else []
        async with served_front(neurons=neurons, **row.gateway) as front:
            if at == "gateway" and CASES[row.number].refusal(dialect).status == 404:
                front.fleet.load_error = ModelNotFound("no node has this model", param="model")
            for suffix in ("", "?beta=true"):
                answer = await front.post(PATHS[dialect] + suffix, row.body(), headers=row.headers)
                check_answer(CASES[row.number], dialect, *answer, code=row.code)
                error = answer[1]["error"]
                if row.param is not None and dialect == "openai":
                    assert error["param"] == row.param
                if row.param is not None:
                    assert row.param in error["message"]
            assert front.fleet.submits == []
            records = await front.fleet.wait_for_finished(2)
            assert {record.model for record in records} <= {"unknown", MODEL}
            assert {record.status for record in records} == {answer[0]}

    run()
    for record in caplog.records:
        line = JsonFormatter("front").format(record)
        assert line.isprintable(), line


@pytest.mark.parametrize(
    "dialect", [pytest.param(name, id=f"case03-{name}-accepted") for name in DIALECTS]
)
@async_test
async def test_odd_json_that_is_json_is_accepted(dialect: DialectName) -> None:
    """The last of two keys counts; NUL in a text is a character."""
    raw = (
        b'{"model":"x","model":"%s","max_tokens":4,"messages":[{"role":"user",'
        b'"content":"a\\u0000b"}]}' % MODEL.encode()
    )
    async with served_front() as front:
        for _ in range(2):
            assert (await front.post(PATHS[dialect], raw))[0] == 200


@pytest.mark.parametrize(
    "dialect", [pytest.param(name, id=f"case11-{name}-chunked") for name in DIALECTS]
)
@async_test
async def test_endless_chunked_body_is_cut_at_the_limit(dialect: DialectName) -> None:
    """The answer comes while the client still sends; what was taken is bounded."""
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(4096):
            sent += 65536
            yield b" " * 65536
            await asyncio.sleep(0)

    async with (
        served_front(max_body_mib=1) as front,
        front.http.post(front.url + PATHS[dialect], data=chunks()) as response,
    ):
        document = msgspec.json.decode(await response.read())
        check_answer(CASES[11], dialect, response.status, document, response.headers)
    assert sent < 128 * 2**20


@pytest.mark.parametrize(
    "dialect", [pytest.param(name, id=f"case09-{name}-router") for name in DIALECTS]
)
@async_test
async def test_wrong_modality_is_the_requests_fault(dialect: DialectName) -> None:
    """As the router tells it, here and at a gateway, streaming or not."""
    for neurons in ([], NEURONS):
        async with served_front(neurons=neurons) as front:
            front.fleet.load_error = WrongModality("it embeds", param="model")
            for stream in (False, True):
                body = chat_body(max_tokens=4, stream=stream)
                answer = await front.post(PATHS[dialect], body)
                check_answer(CASES[9], dialect, *answer)


def _keys() -> list[Key]:
    window = Window(kind="rolling", seconds=50)
    return [
        Key(key_id=name, key_sha256=key_digest(name), **fields)
        for name, fields in {
            "good": {},
            "other-model": {"models": ["org/other"]},
            "spent": {"hard_cap": 1},
            "windowed": {"hard_cap": 40, "window": window},
        }.items()
    ]


KEY_ROWS = [(15, ""), (15, "bad"), (16, "other-model"), (17, "spent"), (18, "windowed")]


@pytest.mark.parametrize(
    ("number", "shown", "dialect"),
    [
        pytest.param(number, shown, dialect, id=f"case{number}-{dialect}-{shown or 'none'}")
        for number, shown in KEY_ROWS
        for dialect in DIALECTS
    ],
)
@async_test
async def test_key_is_refused(number: int, shown: str, dialect: DialectName) -> None:
    """Before anything is loaded, by either header, streaming or not."""
    async with served_front(keys=_keys()) as front:
        if number == 18:
            headers = {"x-api-key": shown}
            status, _, _ = await front.post(
                PATHS["openai"], chat_body(max_tokens=9), headers=headers
            )
            assert status == 200
            await front.fleet.wait_for_charge()
        before = len(front.fleet.submits)
        for headers in ({"x-api-key": shown}, {"Authorization": f"Bearer {shown}"}):
            for stream in (False, True):
                body = chat_body(max_tokens=30, stream=stream)
                answer = await front.post(PATHS[dialect], body, headers=headers if shown else {})
                check_answer(CASES[number], dialect, *answer)
                if number == 15:
                    assert MODEL not in answer[1]["error"]["message"]
        assert len(front.fleet.submits) == before
        assert len(front.fleet.all_sent(Route)) == before
