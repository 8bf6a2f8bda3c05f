"""A whole answer where a stream was asked for: said as the events of one.

Some servers answer `"stream": true` with one JSON document when something in the request cannot be
streamed there. The client has asked for events and reads nothing else, so it gets the document as
two of them. Used by the proxy in the place of a `RelayedStream`; state: the bytes so far.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from actors.front.dialect import DONE
from actors.front.relayed import Counts, Relay
from cortexd.errors import UpstreamInterrupted, UpstreamProtocol
from cortexd.foreign_error import foreign_error

_MAX_BYTES: Final = 64 * 1024 * 1024


class WholeAnswer:
    """Collect one document; `relay` gets it as a chat or text completion's stream."""

    def __init__(self, relay: Relay, node: str) -> None:
        self._relay = relay
        self._node = node
        self._parts: list[bytes] = []
        self._num_bytes = 0

    # Nothing is sent before the end.
    is_between_events: Final = True
    takes_chunks: Final = False

    def push_chunk(self, framed: bytes, start: int) -> bytes:
        """Do as `push` does for the document's part in an HTTP chunk."""
        return self.push(framed[start:-2])

    @property
    def has_data(self) -> bool:
        """Tell whether the answer has passed."""
        return self._relay.has_data

    @property
    def finish_reason(self) -> str | None:
        """Return why the model stopped, None when the answer did not say."""
        return self._relay.finish_reason

    @property
    def error_code(self) -> str | None:
        """Return the code of an error event, None when there was none."""
        return self._relay.error_code

    @property
    def num_tokens(self) -> int:
        """Return how many events have passed."""
        return self._relay.num_tokens

    def counts(self) -> Counts:
        """Return the tokens as the server counted them."""
        return self._relay.counts()

    def push(self, chunk: bytes) -> bytes:
        """Keep a piece of the document. Raises: UpstreamProtocol when it is too long."""
        self._parts.append(chunk)
        self._num_bytes += len(chunk)
        if self._num_bytes > _MAX_BYTES:
            raise self._fault(f"a document of more than {_MAX_BYTES} bytes")
        return b""

    def flush(self) -> bytes:
        """Return all events. Raises: UpstreamInterrupted when the document is no completion."""
        body = b"".join(self._parts)
        try:
            document = msgspec.json.decode(body, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise self._fault("what is no JSON object") from None
        if isinstance(document.get("error"), dict):
            raise UpstreamInterrupted(foreign_error(self._node, 502, body).message, retry_after_s=2)
        events = _events(document)
        if events is None:
            raise self._fault("a document that is no completion")
        return self._relay.push(events) + self._relay.flush()

    def _fault(self, what: str) -> UpstreamProtocol:
        return UpstreamProtocol(
            f'node "{self._node}" answered a request for a stream with {what}; ask it without '
            '"stream", or try another',
            retry_after_s=2,
        )


def _events(document: dict[str, Any]) -> bytes | None:
    """Return the words in one event, their end and the usage in a second; None without choices."""
    choices = document.get("choices")
    if not isinstance(choices, list) or not choices:
        return None
    words, ends = [], []
    for position, choice in enumerate(choices):
        if not isinstance(choice, dict):
            return None
        index = choice.get("index", position)
        end = {name: choice[name] for name in ("finish_reason", "stop_reason") if name in choice}
        word = {**choice, **dict.fromkeys(end), "index": index}
        if "text" in choice:
            end["text"] = ""
        elif isinstance(message := word.pop("message", None), dict):
            word["delta"] = {**message, **_numbered_calls(message)}
            end["delta"] = {}
        else:
            return None
        words.append(word)
        ends.append({"index": index, **end})
    kind = "chat.completion.chunk" if "delta" in words[0] else "text_completion"
    head = {**document, "object": kind}
    usage = head.pop("usage", None)
    # With the end, not in an event of its own: clients that did not ask for that one trip over it.
    last = {**head, "choices": ends, **({} if usage is None else {"usage": usage})}
    encode = msgspec.json.encode
    first = {**head, "choices": words}
    return b"data: " + encode(first) + b"\n\ndata: " + encode(last) + b"\n\n" + DONE


def _numbered_calls(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return {}
    numbered = [
        {"index": index, **call} for index, call in enumerate(calls) if isinstance(call, dict)
    ]
    return {"tool_calls": numbered} if numbered else {}
