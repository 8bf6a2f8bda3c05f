"""Following a stream and replacing a model name: pure, at every cut point."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.front.model_value import with_model
from actors.front.relayed import Counts, RelayedStream, read_counts, read_whole

OPENAI = (
    b'data: {"choices":[{"delta":{"content":"caf\xc3\xa9 \\"usage\\": {}"}}]}\n\n'
    b": ping\n"
    b'data: {"choices":[{"delta":{},"finish_reason":"length"}]}\r\n\r\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":4,'
    b'"prompt_tokens_details":{"cached_tokens":2}}}\n\ndata: [DONE]\n\n'
)
ANTHROPIC = (
    b'event: message_start\ndata: {"type":"message_start","message":{"usage":'
    b'{"input_tokens":7,"output_tokens":0,"cache_read_input_tokens":2}}}\n\n'
    b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},'
    b'"usage":{"output_tokens":4}}\n\n'
)
RESPONSES = (
    b'event: response.created\ndata: {"type":"response.created","response":{"usage":null,'
    b'"error":null}}\n\n'
    b'event: response.completed\ndata: {"type":"response.completed","response":{"error":null,'
    b'"usage":{"input_tokens":9,"input_tokens_details":{"cached_tokens":2},'
    b'"output_tokens":4}}}\n\n'
)


@pytest.mark.parametrize("data", [OPENAI, ANTHROPIC, RESPONSES])
def test_any_cut_gives_the_same_bytes_lines_and_counts(data: bytes) -> None:
    """Bytes pass unchanged, in whole lines, and the counts are the node's own."""
    for cut in range(len(data) + 1):
        stream = RelayedStream()
        parts = [stream.push(data[:cut]), stream.push(data[cut:]), stream.flush()]
        assert b"".join(parts) == data
        assert all(part == b"" or part.endswith(b"\n") for part in parts)
        assert stream.counts() == Counts(9, 4, 2)
        assert stream.is_between_events
        assert stream.error_code is None
    assert data is RESPONSES or stream.finish_reason in {"length", "end_turn"}


def test_one_byte_at_a_time_is_the_same() -> None:
    """The smallest segments change nothing."""
    stream = RelayedStream()
    data = b"".join(stream.push(bytes([byte])) for byte in OPENAI)
    assert (data, stream.counts()) == (OPENAI, Counts(9, 4, 2))


def test_stream_without_usage_is_counted_and_its_error_seen() -> None:
    """Events stand for tokens where nothing better is known; an error event has its code."""
    stream = RelayedStream()
    stream.push(b'data: {"choices":[]}\n\n' * 5 + b'data: {"error":{"code":"engine_gone"}}\n\n')
    assert stream.counts() == Counts(completion_tokens=4, is_estimated=True)
    assert stream.error_code == "engine_gone"
    failed = RelayedStream()
    failed.push(b'data: {"type":"response.failed","response":{"error":{"code":"engine_gone"}}}\n\n')
    assert failed.error_code == "engine_gone"
    stream.push(b"data: half an ev")
    assert stream.is_between_events
    stream.flush()
    assert not stream.is_between_events


def test_usage_of_a_whole_answer_is_the_last_object() -> None:
    """Details that bear similar names do not shadow it."""
    body = b'{"usage":{"completion_tokens_details":{"reasoning_tokens":1},"completion_tokens":5}}'
    assert read_counts(body) == Counts(0, 5, 0)
    assert read_counts(b'{"usage":null,"text":"\\"usage\\":{}"}') is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=6), JSON, max_size=5), st.text(max_size=9))
def test_only_the_top_level_model_changes(document: dict[str, object], name: str) -> None:
    """Whatever stands around it, every other byte stays."""
    document["model"] = "old"
    body = msgspec.json.format(msgspec.json.encode(document), indent=1)
    changed = with_model(body, name)
    assert msgspec.json.decode(changed) == {**document, "model": name}
    assert with_model(changed, "old") == body


@pytest.mark.parametrize(
    ("body", "changed"),
    [
        (rb'{"x\"model":"a","model":"a"}', rb'{"x\"model":"a","model":"b"}'),
        (rb'{"x":["model","\\"],"model":"a"}', rb'{"x":["model","\\"],"model":"b"}'),
        (
            rb'{"x":{"y":[{"model":"}"}]}, "model":"a"}',
            rb'{"x":{"y":[{"model":"}"}]}, "model":"b"}',
        ),
        (rb'{"m":"model","\u006dodel" : "a"}', rb'{"m":"model","\u006dodel" : "b"}'),
        (rb'{"model":"model","n":{"model":1}}', rb'{"model":"b","n":{"model":1}}'),
        (rb'{"model":"a","tools":[{"model":"c"}],"model":"a"}', None),
    ],
)
def test_what_looks_like_the_model_is_left_alone(body: bytes, changed: bytes | None) -> None:
    """In strings, in other keys and further in."""
    expected = changed or rb'{"model":"b","tools":[{"model":"c"}],"model":"b"}'
    assert with_model(body, "b") == expected


def test_escaped_key_and_duplicates_are_all_replaced() -> None:
    """Whichever of them a server reads, it reads the model."""
    body = b'{"mod\\u0065l":"a", "x":{"model":"a"}, "model" :\t"a\\"}"}'
    assert with_model(body, "b") == b'{"mod\\u0065l":"b", "x":{"model":"a"}, "model" :\t"b"}'


def test_prompt_of_a_message_counts_what_a_cache_held_too() -> None:
    """That dialect tells cached tokens beside the others, OpenAI's among them."""
    usage = b'"usage":{"input_tokens":22,"cache_creation_input_tokens":3,'
    usage += b'"cache_read_input_tokens":192,"output_tokens":5}'
    counts, _ = read_whole(b'{"type":"message","stop_reason":"end_turn",' + usage + b"}")
    assert counts == Counts(217, 5, 192)
    stream = RelayedStream()
    stream.push(b'event: message_start\ndata: {"message":{' + usage + b"}}\n\n")
    stream.push(
        b'event: message_delta\ndata: {"delta":{"stop_reason":"end_turn"},' + usage + b"}\n\n"
    )
    assert stream.counts() == Counts(217, 5, 192)


def test_message_that_is_cut_off_is_counted_by_its_events() -> None:
    """Its first event has told the prompt, and next to nothing of the answer."""
    stream = RelayedStream()
    stream.push(
        b'event: message_start\ndata: {"type":"message_start","message":{"stop_reason":null,'
        b'"usage":{"input_tokens":7,"cache_read_input_tokens":2,"output_tokens":1}}}\n\n'
    )
    stream.push(b'event: content_block_start\ndata: {"type":"content_block_start"}\n\n')
    for _ in range(50):
        stream.push(b'event: content_block_delta\ndata: {"delta":{"text":"x"}}\n\n')
    assert stream.counts() == Counts(9, 50, 2, is_estimated=True)
