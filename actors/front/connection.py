"""One HTTP connection: the library's protocol with a deadline for heads and our error shape.

The library has no deadline for a request head that never ends (slow loris) and answers bytes that
are not HTTP with its own text; both are mended here.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

from aiohttp import web

from actors.front.error_response import (
    anthropic_error_response,
    error_response,
    set_request_id,
)
from cortexd.errors import CortexError, Internal, InvalidRequest, RequestTimeout

HEAD_TIMEOUT_S = 10.0
# All that is known of a request whose head cannot be read, to answer in its dialect.
_MESSAGES_START = b"POST /v1/messages"
_UNREAD_CODING = "Can not decode content-encoding"


class Connection(web.RequestHandler):
    """Close a connection whose request head does not arrive whole in time."""

    head_timeout_s = HEAD_TIMEOUT_S

    def __init__(self, *args: Any, on_lost: Callable[[], None] | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._on_lost = on_lost
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_start = b""
        # Called when more waits for the client than may.
        self.on_full: Callable[[], None] | None = None

    def data_received(self, data: bytes) -> None:
        """Pass bytes on; start the clock when they leave a head unfinished."""
        num_heads = self._request_count
        if self._is_between_requests():
            start = b"" if self._head_timer is None else self._head_start
            self._head_start = (start + data[: len(_MESSAGES_START)])[: len(_MESSAGES_START)]
        super().data_received(data)
        if self._request_count > num_heads:
            self._stop_head_timer()
        elif self._head_timer is None and self._is_between_requests():
            self._head_timer = self._loop.call_later(self.head_timeout_s, self._head_overdue)

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Read again; where nothing was paused, spare the parser the look at no bytes.

        The library asks for this twice a request, and each time costs as much as the parsing.
        """
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def pause_writing(self) -> None:
        """Tell who writes that the client does not keep up."""
        super().pause_writing()
        if self.on_full is not None:
            self.on_full()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Forget the clock."""
        self._stop_head_timer()
        if self._on_lost is not None:
            self._on_lost()
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer a request that never reached a handler, in the API's error envelope."""
        if request.writer is not None and request.writer.output_size > 0:
            raise ConnectionError("part of a response was sent already")
        if status < 500:
            error = self._answer(_unusable(message or "bad request"))
        else:
            self.log_exception("http.unhandled", exc_info=exc)
            error = self._answer(Internal("the server failed; see its log"))
        error.force_close()
        return error

    def _answer(self, error: CortexError) -> web.Response:
        request_id = uuid.uuid4().hex
        if self._head_start == _MESSAGES_START:
            answer = anthropic_error_response(error, request_id)
        else:
            answer = error_response(error)
        set_request_id(answer, request_id)
        return answer

    def _is_between_requests(self) -> bool:
        return self._current_request is None and not self._messages

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_overdue(self) -> None:
        self._head_timer = None
        if not self._is_between_requests() or self.transport is None:
            return
        answer = self._answer(
            RequestTimeout(f"the request head was not complete after {self.head_timeout_s:g} s")
        )
        assert isinstance(answer.body, bytes), "an error is one piece"
        fields = {**answer.headers, "Connection": "close", "Content-Length": len(answer.body)}
        lines = [f"{name}: {value}" for name, value in fields.items()]
        head = "\r\n".join(["HTTP/1.1 408 Request Timeout", *lines, "", ""])
        self.transport.write(head.encode() + answer.body)
        self.force_close()


def _unusable(message: str) -> InvalidRequest:
    """Return the error for what the library says of a request that it could not read."""
    if _UNREAD_CODING in message:  # it would have the client install what is not here
        return InvalidRequest(
            "the body's Content-Encoding is not read here; allowed: gzip, deflate"
        )
    first_line = message.splitlines()[0][:200].rstrip(":")
    return InvalidRequest(f"the request is not valid HTTP: {first_line}")
