"""What passes through a relayed stream: whole lines out, and a tail to read the counts from.

Lines are never split, so that a keep-alive or an error event of ours can follow any of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, Protocol

import msgspec

_TAIL_BYTES: Final = 64 * 1024
_MAX_KEPT_BYTES: Final = 2 * _TAIL_BYTES
_MAX_HELD_BYTES: Final = 256 * 1024
# Inside a JSON string the quotes would be escaped, so text cannot pass for the field. A search for
# the plain words comes first: on a long stream it takes a tenth of the expression's time.
_USAGE: Final = re.compile(rb'"usage"\s*:\s*(\{)')
_REASONS: Final = (b'"finish_reason"', b'"stop_reason"')
_REASON: Final = re.compile(rb'"(?:finish_reason|stop_reason)"\s*:\s*"(\w+)"')
_MESSAGE_START: Final = b"event: message_start\n"
_BRACE: Final = re.compile(rb"[{}]")
_ERROR_LINE: Final = re.compile(
    rb'^data:\s*\{"(?:error"|type":\s*"(?:error|response\.failed)")', re.MULTILINE
)
_ERROR_CODE: Final = re.compile(rb'(?<!\\)"code"\s*:\s*"(\w+)"')
_MAX_PASSED: Final = 64
_LARGE_BYTES: Final = 4096
_END_EVENTS: Final = 2  # the finish event and the end mark carry no token


class Counts(msgspec.Struct, frozen=True):
    """Tokens of one request as the upstream counted them; `is_estimated`: it did not."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    is_estimated: bool = False


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: _PromptDetails | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


class _End(msgspec.Struct):
    finish_reason: str | None = None


class _Whole(msgspec.Struct):
    """What is read of a whole answer, of either dialect."""

    usage: _Usage | None = None
    choices: list[_End] = []
    stop_reason: str | None = None


_whole_decoder = msgspec.json.Decoder(_Whole)


class Relay(Protocol):
    """What passes a node's stream on to the client, and keeps count."""

    @property
    def is_between_events(self) -> bool:
        """Tell whether an event of ours may follow."""

    @property
    def takes_chunks(self) -> bool:
        """Tell whether `push_chunk` may be called: no event is half here."""

    def push_chunk(self, framed: bytes, start: int) -> bytes:
        """Do as `push` does for whole events in an HTTP chunk, at `start`; return it framed too.

        Raises: UpstreamInterrupted.
        """

    @property
    def has_data(self) -> bool:
        """Tell whether an event has passed."""

    @property
    def finish_reason(self) -> str | None:
        """Return why the model stopped, None when the stream did not say."""

    @property
    def error_code(self) -> str | None:
        """Return the code of an error event, None when there was none."""

    @property
    def num_tokens(self) -> int:
        """Return how many tokens have passed if each had an event of its own."""

    def push(self, chunk: bytes) -> bytes:
        """Return what the client gets for a piece of the stream. Raises: UpstreamInterrupted."""

    def flush(self) -> bytes:
        """Return what the client gets at the stream's end. Raises: UpstreamInterrupted."""

    def counts(self) -> Counts:
        """Return the tokens so far."""


class RelayedStream:
    """Follow one event stream."""

    def __init__(self) -> None:
        self.is_between_events = True
        self._held = b""
        self._num_events = 0
        # What has passed since it was last looked through: to do that for each piece costs more.
        self._passed: list[bytes] = []
        # The dialect with message_start counts the prompt in its first event.
        self._head = b""
        self._tail = b""

    def push(self, chunk: bytes) -> bytes:
        """Return the whole lines that the chunk completes."""
        if self._held or not chunk.endswith(b"\n"):
            chunk = self._whole_lines(chunk)
            if not chunk:
                return chunk
        self._note(chunk)
        if chunk.endswith(b"\n\n"):
            self.is_between_events = True
        else:
            self._read_last_line(chunk)
        return chunk

    @property
    def takes_chunks(self) -> bool:
        """Tell whether `push_chunk` may be called: no event is half here."""
        return self.is_between_events and not self._held

    def push_chunk(self, framed: bytes, start: int) -> bytes:
        """Return the chunk as it is."""
        passed = self._passed  # the framing between events hides nothing that is looked for
        passed.append(framed)
        if len(passed) >= _MAX_PASSED or len(framed) > _LARGE_BYTES:
            self._look_through()
        return framed

    def _note(self, chunk: bytes) -> None:
        self._passed.append(chunk)
        if len(self._passed) >= _MAX_PASSED or len(chunk) > _LARGE_BYTES:
            self._look_through()

    def flush(self) -> bytes:
        """Return what the stream ended with, if that was no whole line."""
        rest, self._held = self._held, b""
        if rest:
            self._note(rest)
            self._read_last_line(rest)
        return rest

    def _whole_lines(self, chunk: bytes) -> bytes:
        """Return what is held and the chunk up to its last line end; hold the rest."""
        data = self._held + chunk
        end = data.rfind(b"\n") + 1
        if end == 0 and len(data) > _MAX_HELD_BYTES:
            end = len(data)  # no line of a stream is so long: pass it on as it is
        self._held = data[end:]
        return data[:end]

    def _read_last_line(self, data: bytes) -> None:
        last_line = data[data.rfind(b"\n", 0, -1) + 1 :]
        if not last_line.startswith(b":"):
            self.is_between_events = last_line.strip() == b""

    def _look_through(self) -> None:
        """Count the events that have passed; keep the beginning of the stream and its tail."""
        if not self._passed:
            return
        data = b"".join(self._passed)
        self._passed.clear()
        self._num_events += data.count(b"data:")
        data = self._tail + data
        if len(data) > _MAX_KEPT_BYTES:
            self._head = self._head or data[:_TAIL_BYTES]
            data = data[-_TAIL_BYTES:]
        self._tail = data

    def _kept(self) -> bytes:
        self._look_through()
        return self._tail

    @property
    def num_events(self) -> int:
        """Return how many events have passed."""
        self._look_through()
        return self._num_events

    @property
    def has_data(self) -> bool:
        """Tell whether an event has passed."""
        return self.num_events > 0

    @property
    def finish_reason(self) -> str | None:
        """Return why the model stopped, None when the stream did not say."""
        return _finish_reason(self._kept())

    @property
    def error_code(self) -> str | None:
        """Return the code of an error event, None when there was none."""
        tail = self._kept()
        found = _ERROR_LINE.search(tail) if b'"error"' in tail else None
        if found is None:
            return None
        code = _ERROR_CODE.search(tail, found.start())
        return code[1].decode() if code is not None else "upstream_error"

    @property
    def num_tokens(self) -> int:
        """Return how many tokens have passed if each had an event of its own."""
        return max(self.num_events - _END_EVENTS, 0)

    def counts(self) -> Counts:
        """Return the tokens; without a usage object the events are counted instead."""
        data = self._kept()
        tail = head = read_counts(data)
        if self._head or data.find(b'"usage"') != data.rfind(b'"usage"'):
            head = read_counts(self._head or data, is_first=True)
        if tail is None or head is None:
            return Counts(completion_tokens=self.num_tokens, is_estimated=True)
        # A message that was cut off has told no more than what its first event counts.
        is_cut = _MESSAGE_START in (self._head or data) and self.finish_reason is None
        return Counts(
            tail.prompt_tokens or head.prompt_tokens,
            max(tail.completion_tokens, self.num_tokens if is_cut else 0),
            tail.cached_tokens or head.cached_tokens,
            is_estimated=is_cut,
        )


def read_whole(body: bytes) -> tuple[Counts | None, str | None]:
    """Return what a whole answer counts, None if it does not, and why the model stopped."""
    try:
        whole = _whole_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return read_counts(body), _finish_reason(body)  # not as the dialects have it
    reason = whole.choices[-1].finish_reason if whole.choices else whole.stop_reason
    return None if whole.usage is None else _counts_of(whole.usage), reason


def read_counts(data: bytes, *, is_first: bool = False) -> Counts | None:
    """Return the last (or first) usage object in JSON or a stream, of either dialect."""
    for at in _places(data, b'"usage"', is_first=is_first):
        found = _USAGE.match(data, at)
        if found is None:
            continue
        try:
            usage = msgspec.json.decode(_object_at(data, found.start(1)), type=_Usage)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        return _counts_of(usage)
    return None


def _places(data: bytes, field: bytes, *, is_first: bool = False) -> Iterator[int]:
    """Yield where a field's name stands, from the end or from the beginning."""
    at = data.find(field) if is_first else data.rfind(field)
    while at >= 0:
        if data[at - 1 : at] != b"\\":
            yield at
        at = data.find(field, at + 1) if is_first else data.rfind(field, 0, at)


def _counts_of(usage: _Usage) -> Counts:
    details = usage.prompt_tokens_details or usage.input_tokens_details
    cached = details.cached_tokens if details is not None else usage.cache_read_input_tokens
    # Of these three, the messages dialect counts each token of the prompt in one.
    asked = (usage.input_tokens or 0) + (usage.cache_read_input_tokens or 0)
    asked += usage.cache_creation_input_tokens or 0
    return Counts(
        max(usage.prompt_tokens or 0, asked),
        max(usage.completion_tokens or 0, usage.output_tokens or 0),
        max(cached or 0, 0),
    )


def _finish_reason(data: bytes) -> str | None:
    """Return the last finish reason of either dialect."""
    last = -1
    reason = None
    for field in _REASONS:
        for at in _places(data, field):
            found = _REASON.match(data, at)
            if found is not None:
                if at > last:
                    last, reason = at, found[1].decode()
                break
    return reason


def _object_at(data: bytes, start: int) -> bytes:
    """Return the bytes from an opening brace to its closing one; usage holds no strings."""
    depth = 0
    for brace in _BRACE.finditer(data, start):
        depth += 1 if brace[0] == b"{" else -1
        if depth == 0:
            return data[start : brace.end()]
    return data[start:]
