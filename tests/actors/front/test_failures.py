"""What clients see, and what is released, when something ends early: them, the engine, patience."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import aiohttp
import msgspec
import pytest

from actors.front import written
from actors.front.sequences import MAX_PENDING_TOKENS
from cortexd.errors import ModelLoadFailed, NonFiniteLogits, Overloaded, ShuttingDown
from cortexd.log import JsonFormatter
from cortexd.messages import Cancel, EndRequest, Route, TokenBatch
from cortexd.messages.inference import SequenceDelta
from cortexd.settings import NeuronEntry
from tests.doubles.fleet import ALIAS, LEADER, MODEL
from tests.doubles.front import ServedFront, async_test, chat_body, parse_events, served_front

CHAT = "/v1/chat/completions"
PING = ": ping"


async def open_stream(front: ServedFront, **fields: Any) -> aiohttp.ClientResponse:
    """Start a stream and return its response once the head is there."""
    return await front.http.post(front.url + CHAT, json=chat_body(stream=True, **fields))


async def read_until(response: aiohttp.ClientResponse, mark: bytes) -> bytes:
    """Return the stream up to and including the first line that holds `mark`."""
    seen = b""
    while mark not in seen:
        line = await response.content.readline()
        assert line, f"the stream ended without {mark!r}: {seen!r}"
        seen += line
    return seen


@async_test
async def test_client_gone_mid_stream_cancels_and_ends_the_lease() -> None:
    """A client that closes its connection frees the engine's sequences and the lease."""
    async with served_front() as front:
        front.fleet.pause_after = 3
        response = await open_stream(front, n=2)
        await read_until(response, b'"content":"l"')
        response.close()
        cancels = await front.fleet.wait_for(Cancel, count=2)
        await front.fleet.wait_for(EndRequest)
        assert len(cancels) == 2
        assert front.fleet.num_running == 0
        record = (await front.fleet.wait_for_finished())[0]
        assert (record.status, record.error_code) == (499, "request_cancelled")
        assert record.completion_tokens == 6


@async_test
async def test_client_gone_during_unary_cancels() -> None:
    """The same without streaming."""
    async with served_front() as front:
        front.fleet.pause_after = 3
        task = asyncio.create_task(front.chat())
        await front.fleet.paused.wait()
        task.cancel()
        await front.fleet.wait_for(Cancel)
        await front.fleet.wait_for(EndRequest)


@async_test
async def test_client_gone_while_loading_ends_the_lease() -> None:
    """A client that leaves while the model loads leaves nothing behind."""
    async with served_front() as front:
        front.fleet.begin_loading()
        task = asyncio.create_task(front.chat())
        await front.fleet.wait_for(Route)
        task.cancel()
        await front.fleet.wait_for(EndRequest)
        assert front.fleet.submits == []


@async_test
async def test_leader_death_mid_stream_sends_an_error_event_and_no_done() -> None:
    """Tokens that were sent stay sent; then one error event, no [DONE], and the end."""
    async with served_front() as front:
        front.fleet.pause_after = 5
        response = await open_stream(front)
        seen = await read_until(response, b'"content":"o"')
        front.kill_leader()
        events = parse_events(seen + await response.read())
        assert events[-1]["error"]["code"] == "engine_restarting"
        assert "[DONE]" not in events
        record = (await front.fleet.wait_for_finished())[0]
        assert (record.status, record.error_code) == (200, "engine_restarting")
        front.fleet.revive_leader()
        front.fleet.resume()
        status, _, _ = await front.chat()
        assert status == 200


@async_test
async def test_leader_death_before_the_first_byte_of_a_stream_is_503() -> None:
    """A stream that was not committed yet gets an honest status and Retry-After."""
    async with served_front(first_byte_hold_ms=60_000) as front:
        front.fleet.pause_after = 0
        task = asyncio.create_task(open_stream(front))
        await front.fleet.paused.wait()
        front.kill_leader()
        response = await task
        assert response.status == 503
        assert response.headers["Retry-After"] == "2"
        assert (await response.json())["error"]["code"] == "engine_restarting"


@async_test
async def test_leader_death_restarts_a_unary_request_once() -> None:
    """An unary client is not told: the request runs again, from the start, on the new epoch."""
    async with served_front() as front:
        front.fleet.pause_after = 5
        task = asyncio.create_task(front.chat())
        await front.fleet.paused.wait()
        front.kill_leader()
        front.fleet.resume()
        front.fleet.revive_leader()
        status, answer, _ = await task
        assert status == 200
        assert answer["choices"][0]["message"]["content"] == "Hello, world!"
        assert answer["usage"]["completion_tokens"] == 13
        assert len(front.fleet.submits) == 2


@async_test
async def test_leader_death_twice_fails_a_unary_request() -> None:
    """A request that may itself be the cause is not tried a third time."""
    async with served_front() as front:
        front.fleet.pause_after = 5
        task = asyncio.create_task(front.chat())
        for _ in range(2):
            await front.fleet.paused.wait()
            front.kill_leader()
            front.fleet.revive_leader()
        status, answer, headers = await task
        assert (status, answer["error"]["code"]) == (503, "engine_restarting")
        assert headers["Retry-After"]
        assert len(front.fleet.submits) == 2


@pytest.mark.parametrize("stream_it", [False, True])
@async_test
async def test_engine_errors_keep_their_class(stream_it: bool) -> None:
    """An error of the sequence itself comes back as it is, with its status."""
    async with served_front() as front:
        for error, status in (
            (NonFiniteLogits("row 3 is not finite"), 500),
            (Overloaded("the queue holds 256 requests", retry_after_s=9), 429),
        ):
            front.fleet.delta_error = error
            got, answer, headers = await front.chat(stream=stream_it)
            assert (got, answer["error"]["code"]) == (status, error.code)
            assert headers.get("Retry-After") == ("9" if status == 429 else None)


@async_test
async def test_loading_model_keeps_a_stream_alive_until_tokens_come() -> None:
    """While a model loads: 200 after the hold, comments, events that change nothing, then text."""
    async with served_front(
        first_byte_hold_ms=10, keepalive_s=0.005, event_keepalive_s=0.02
    ) as front:
        front.fleet.begin_loading()
        response = await open_stream(front)
        assert response.status == 200
        seen = await read_until(response, b": ping")
        seen += await read_until(response, b'"role":"assistant"')
        seen += await read_until(response, b'"delta":{}')
        front.fleet.finish_loading()
        events = parse_events(seen + await response.read())
        documents = [event for event in events if isinstance(event, dict)]
        assert events.count(PING) >= 1
        assert documents[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert sum("role" in event["choices"][0]["delta"] for event in documents) == 1
        assert events[-1] == "[DONE]"
        assert (await front.fleet.wait_for_finished())[0].cold_start


@async_test
async def test_long_prefill_keeps_a_stream_alive() -> None:
    """Silence of a busy engine is filled the same way."""
    async with served_front(first_byte_hold_ms=5, keepalive_s=0.005) as front:
        front.fleet.pause_after = 0
        response = await open_stream(front)
        seen = await read_until(response, b": ping\n")
        front.fleet.resume()
        events = parse_events(seen + await response.read())
        assert events[-1] == "[DONE]"


@async_test
async def test_load_failure_after_the_commit_is_an_error_event() -> None:
    """A load that fails after the 200 ends the stream with its cause."""
    async with served_front(first_byte_hold_ms=5, keepalive_s=0.005) as front:
        front.fleet.begin_loading()
        response = await open_stream(front)
        seen = await read_until(response, b": ping\n")
        front.fleet.load_error = ModelLoadFailed("the file is broken")
        front.fleet.incarnations[LEADER] = None  # the route's answer is out of date: ask again
        front.fleet.finish_loading()
        events = parse_events(seen + await response.read())
        assert events[-1]["error"]["code"] == "model_load_failed"


@async_test
async def test_unary_patience_over_is_503_model_loading() -> None:
    """Without streaming, the wait for a load is bounded; the answer says when to come back."""
    for patience_s in (0.0, 0.01):
        async with served_front(unary_load_wait_s=patience_s) as front:
            front.fleet.begin_loading()
            status, answer, headers = await front.chat()
            assert (status, answer["error"]["code"]) == (503, "model_loading")
            assert answer["error"]["progress"] == 0.5
            assert headers["Retry-After"] == "8"


@async_test
async def test_router_restart_is_waited_out() -> None:
    """A request that meets the router between two incarnations is served."""
    async with served_front() as front:
        front.fleet.incarnations["router"] = None
        task = asyncio.create_task(front.chat())
        await front.fleet.wait_for(Route)
        front.fleet.incarnations["router"] = 2
        status, _, _ = await task
        assert status == 200


@async_test
async def test_request_timeout_ends_the_request() -> None:
    """No request outlives gateway.request_timeout_s, streaming or not."""
    async with served_front(request_timeout_s=0.5, first_byte_hold_ms=5) as front:
        front.fleet.pause_after = 2
        status, answer, _ = await front.chat()
        assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
        events = await front.stream(CHAT, chat_body(stream=True))
        assert events[-1]["error"]["code"] == "deadline_exceeded"
        assert front.fleet.num_running == 0


@async_test
async def test_client_that_does_not_read_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream whose socket does not drain is cut, and its engine work with it."""
    monkeypatch.setattr(written, "WRITE_TIMEOUT_S", 0.05)
    async with served_front(send_buffer_bytes=4096) as front:
        front.fleet.context = 10_000
        front.fleet.reply = b"x" * 5000
        _, writer = await asyncio.open_connection("127.0.0.1", front.port, limit=1)
        body = msgspec.json.encode(chat_body(stream=True))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await front.fleet.wait_for(Cancel)
        await front.fleet.wait_for_finished()
        assert (await front.fleet.wait_for_finished())[0].error_code == "slow_client"
        writer.close()


@pytest.mark.parametrize("is_gateway", [False, True])
@async_test
async def test_refusal_by_the_router_counts_for_the_model_it_is_about(is_gateway: bool) -> None:
    """A full queue is that model's, also before anybody was told where it runs."""
    neurons = [NeuronEntry(name="n", endpoint="http://n")] if is_gateway else []
    async with served_front(neurons=neurons) as front:
        front.fleet.load_error = Overloaded("full", retry_after_s=1)
        front.fleet.load_error.model = MODEL
        assert (await front.chat(model=ALIAS))[0] == 429
        front.fleet.load_error.model = None
        assert (await front.chat(model="org/invented"))[0] in {404, 429}
        known, invented = await front.fleet.wait_for_finished(2)
        assert (known.model, invented.model) == (MODEL, "unknown")


@async_test
async def test_client_too_far_behind_is_cut_off_and_not_told_that_this_was_all() -> None:
    """What the engine was stopped at is no ending: the stream breaks, without an end mark."""
    async with served_front() as front:
        front.fleet.pause_after = 3
        response = await open_stream(front)
        await read_until(response, b'"content":"l"')
        (submit,) = front.fleet.submits
        delta = SequenceDelta(submit.sequence_id, list(b"x" * (MAX_PENDING_TOKENS + 1)))
        front.services.sequences.dispatch(TokenBatch(front.fleet.epoch, 1, [delta]))
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
        await front.fleet.wait_for(Cancel)
        record = (await front.fleet.wait_for_finished())[0]
        assert (record.status, record.error_code) == (499, "request_cancelled")


@async_test
async def test_draining_refuses_new_requests_and_closes() -> None:
    """While draining: 503 server_shutting_down with Retry-After; probes still answer."""
    async with served_front() as front:
        front.services.is_draining = True
        status, answer, headers = await front.chat()
        assert (status, answer["error"]["code"]) == (503, "server_shutting_down")
        assert headers["Retry-After"] == "5"
        assert headers["Connection"] == "close"
        assert (await front.get("/readyz"))[0] == 503
        assert (await front.get("/livez"))[0] == 200


@async_test
async def test_shutdown_ends_streams_with_an_error_event() -> None:
    """A stream that does not end within the drain gets an error event."""
    async with served_front() as front:
        front.fleet.pause_after = 3
        response = await open_stream(front)
        seen = await read_until(response, b'"content":"l"')
        front.services.sequences.fail_all(ShuttingDown("this server is shutting down"))
        events = parse_events(seen + await response.read())
        assert events[-1]["error"]["code"] == "server_shutting_down"


@async_test
async def test_unforeseen_error_mid_stream_is_an_error_event(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A fault of ours after the first byte: the client gets an error event, the log the cause."""
    async with served_front() as front:
        front.fleet.pause_after = 3
        response = await open_stream(front)
        seen = await read_until(response, b'"content":"l"')
        sequence_id = front.fleet.submits[0].sequence_id
        bad = SequenceDelta(sequence_id, [999])  # no such byte: the detokenizer raises
        front.services.sequences.dispatch(TokenBatch(1, 1, [bad]))
        events = parse_events(seen + await response.read())
        assert events[-1]["error"]["code"] == "internal_error"
        assert "http.failed" in caplog.text


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        (CHAT, {"model": "gpt-x", "messages": [{"role": "user", "content": "hush"}]}, "gpt-x"),
        (CHAT, chat_body("hush " * 200), "maximum context length"),
        (CHAT, chat_body("hush", temperature=9), "temperature"),
        ("/api/chat", chat_body("hush"), "/api/chat"),
        ("/v1/messages/count_tokens", {"model": "gpt-x", "messages": []}, '"message":"messages"'),
    ],
)
@async_test
async def test_refused_request_has_one_log_line_with_its_id_and_what_was_wrong(
    path: str, body: dict[str, Any], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An operator finds why a client was refused, and never what it had written."""
    caplog.set_level(logging.INFO, "front")
    async with served_front() as front:
        await front.post(path, body, headers={"x-request-id": "find-me"})
    (line,) = [json for json in map(_json_line, caplog.records) if b"find-me" in json]
    assert told.encode() in line
    assert b"hush" not in line


def _json_line(record: logging.LogRecord) -> bytes:
    return JsonFormatter("front.0").format(record).encode()
