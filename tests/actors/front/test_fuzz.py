"""Random JSON against the inference endpoints: never a 500, always JSON of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexd.anthropic import MessagesRequest
from cortexd.openai import ChatCompletionRequest, CompletionRequest
from cortexd.responses import ResponsesRequest
from cortexd.tokenize import DetokenizeRequest, TokenizeRequest
from tests.doubles.fleet import MODEL
from tests.doubles.front import ServedFront, served_front

FIELDS = sorted(
    {
        *ChatCompletionRequest.__struct_fields__,
        *CompletionRequest.__struct_fields__,
        *MessagesRequest.__struct_fields__,
        *ResponsesRequest.__struct_fields__,
        *TokenizeRequest.__struct_fields__,
        *DetokenizeRequest.__struct_fields__,
    }
    - {"stream"}
)
KEYS = ["role", "content", "type", "text", "tool_calls", "1", "name", "function", "parameters"]
KEYS += ["id", "input", "input_schema", "tool_use_id", "thinking", "source", "description"]
WORDS = ["text", "user", "assistant", "none", "auto", "any", "function", "tool_use", "tool_result"]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from([MODEL, *WORDS])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=10,
)
BODIES = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6).map(
    lambda fields: {
        "model": MODEL,
        "messages": [{"role": "user", "content": "x"}],
        "prompt": "x",
        "input": "x",
        "max_tokens": 5,
        **fields,
    }
)

MESSAGES = ["/v1/messages", "/v1/messages/count_tokens"]
PATHS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/tokenize",
    "/detokenize",
    *MESSAGES,
]


class LiveFront:
    """A front that serves across hypothesis' examples, on its own loop."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        self._context: AbstractAsyncContextManager[ServedFront] = served_front()
        self._front = self._loop.run_until_complete(self._context.__aenter__())

    def post(self, path: str, data: bytes) -> tuple[int, Any]:
        """Return status and decoded body."""
        status, body, _ = self._loop.run_until_complete(self._front.post(path, data))
        self._front.fleet.sent.clear()
        return status, body

    def close(self) -> None:
        """End the server."""
        self._loop.run_until_complete(self._context.__aexit__(None, None, None))
        self._loop.close()


@pytest.fixture(scope="module")
def live_front() -> Iterator[LiveFront]:
    """Serve for the whole module."""
    front = LiveFront()
    yield front
    front.close()


def check(status: int, body: Any) -> None:
    """An answer, or an error of the client's with its envelope."""
    if status == 200:
        answers = {"choices", "content", "input_tokens", "output", "tokens", "prompt"}
        assert body.keys() & answers
        return
    assert 400 <= status < 500, body
    if body.get("type") == "error":
        assert {"type", "message"} <= set(body["error"]) <= {"type", "message", "details"}
    else:
        assert set(body["error"]) >= {"message", "type", "code", "param"}


@given(body=BODIES, path=st.sampled_from(PATHS))
@settings(max_examples=160)
def test_fuzz_typed_bodies_never_500(live_front: LiveFront, body: Any, path: str) -> None:
    """Known fields with any JSON value."""
    check(*live_front.post(path, msgspec.json.encode(body)))


@given(data=st.binary(max_size=64) | VALUES.map(msgspec.json.encode))
@settings(max_examples=60)
def test_fuzz_any_bytes_never_500(live_front: LiveFront, data: bytes) -> None:
    """Any bytes, and any JSON value, as the body."""
    for path in ("/v1/chat/completions", "/v1/messages"):
        check(*live_front.post(path, data))
