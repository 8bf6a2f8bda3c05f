"""The shapes of `/v1/responses`: stream events, and the whole answer.

An answer is a list of items in the order in which the model wrote their pieces; the stream opens,
fills and closes the very same items.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec

from actors.front.choice import ChoiceOutput
from actors.front.decode import decode_body
from actors.front.dialect import COMMENT, Answer, ChunkEncoder
from actors.front.request import InferenceRequest
from actors.front.response_items import ResponseItems
from actors.front.validate import check_chat
from cortexd.errors import CortexError
from cortexd.openai import Usage
from cortexd.responses import (
    IncompleteDetails,
    Response,
    ResponseError,
    ResponsesRequest,
    ResponseStatus,
    usage_of,
)
from cortexd.translate_responses import to_chat_request


class ResponsesDialect:
    """`/v1/responses`."""

    route = "/v1/responses"
    id_prefix = "resp_"

    def parse(self, body: bytes) -> InferenceRequest:
        """Return the checked request."""
        request = check_chat(
            to_chat_request(decode_body(body, ResponsesRequest)), schema_path="parameters"
        )
        return replace(request, call_ending="tool_calls")

    def encoder(self, answer: Answer) -> ChunkEncoder:
        """Return a fresh stream encoder."""
        return ResponsesEncoder(answer)

    def response(self, answer: Answer, outputs: list[ChoiceOutput], usage: Usage) -> bytes:
        """Return the whole answer."""
        encoder = ResponsesEncoder(answer)
        encoder.chunk(outputs[0])
        return msgspec.json.encode(encoder.ended(usage))


class ResponsesEncoder:
    """Encode one stream of events; holds the items that are whole and the one that is open."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._items = ResponseItems(answer.id)
        self._has_started = False
        self._is_cut = False

    def chunk(self, output: ChoiceOutput) -> bytes:
        """Return the events of all pieces."""
        events = self._start()
        for piece in output.pieces:
            events += self._items.add(piece)
        if output.finish_reason is not None:
            self._is_cut = output.finish_reason == "length"
        return events

    def comment(self) -> bytes:
        """Return a comment line."""
        return COMMENT

    def keepalive(self) -> bytes:
        """Return the first events when they are still due, else that it goes on."""
        return self._start() or self._event("in_progress", "in_progress")

    def end(self, usage: Usage) -> bytes:
        """Close the open item and the response."""
        ending = self._items.close(is_cut=self._is_cut)
        return self._start() + ending + self._ending(self.ended(usage))

    def error(self, error: CortexError) -> bytes:
        """Return the event of a response that failed."""
        failed = msgspec.structs.replace(
            self._response("failed"), error=ResponseError(error.code, error.message)
        )
        return self._start() + self._ending(failed)

    def ended(self, usage: Usage) -> Response:
        """Return the response as it is in the end."""
        self._items.close(is_cut=self._is_cut)
        return msgspec.structs.replace(
            self._response("incomplete" if self._is_cut else "completed"),
            usage=usage_of(usage),
            incomplete_details=IncompleteDetails() if self._is_cut else None,
        )

    def _start(self) -> bytes:
        if self._has_started:
            return b""
        self._has_started = True
        return self._event("created", "in_progress") + self._event("in_progress", "in_progress")

    def _event(self, name: str, status: ResponseStatus) -> bytes:
        return self._items.event(f"response.{name}", response=self._response(status))

    def _ending(self, response: Response) -> bytes:
        return self._items.event(f"response.{response.status}", response=response)

    def _response(self, status: ResponseStatus) -> Response:
        return Response(
            id=self._answer.id,
            created_at=self._answer.created,
            status=status,
            model=self._answer.model,
            output=list(self._items.whole),
        )
