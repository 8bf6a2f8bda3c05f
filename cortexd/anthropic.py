"""The Anthropic Messages API's documents: request body, answer, stream events, models, errors.

Pure data, as `cortexd.openai`. Messages and tools stay free-form here, since clients send kinds of
blocks that are newer than this program; `cortexd.translate` reads them. Fields that only tune or
bill the original service (`metadata`, `service_tier`, `context_management`, ...) are ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from cortexd.errors import ContextLengthExceeded, CortexError, Detail
from cortexd.openai import EngineFields, JsonObject, StopString, TokenCount, Turns, Usage

OVERLOADED_STATUS: Final = 529
_TYPES_BY_STATUS: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    OVERLOADED_STATUS: "overloaded_error",
}


class CountTokensRequest(EngineFields, frozen=True, kw_only=True):
    """Body of `POST /v1/messages/count_tokens`. The engine's fields make no difference to it."""

    model: Annotated[str, Meta(min_length=1, max_length=512)] | None = None
    messages: Turns | None = None
    system: str | list[JsonObject] | None = None
    tools: list[JsonObject] | None = None
    tool_choice: JsonObject | None = None
    thinking: JsonObject | None = None
    output_config: JsonObject | None = None
    output_format: JsonObject | None = None
    # Would change the answer, not supported: refused by name.
    mcp_servers: list[Any] | None = None
    thread: Any = None


class MessagesRequest(CountTokensRequest, frozen=True, kw_only=True):
    """Body of `POST /v1/messages`."""

    max_tokens: TokenCount | None = None
    stop_sequences: Annotated[list[StopString], Meta(max_length=64)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    compaction: Any = None
    container: Any = None


class TextBlock(msgspec.Struct, frozen=True, tag="text"):
    """Words for the reader."""

    text: str


class ThinkingBlock(msgspec.Struct, frozen=True, tag="thinking"):
    """Reasoning. Clients send blocks back unchanged; `signature` tells ours apart."""

    thinking: str
    signature: str


class ToolUseBlock(msgspec.Struct, frozen=True, tag="tool_use"):
    """One call of a tool; `input` is its arguments' object as the model wrote it."""

    id: str
    name: str
    input: msgspec.Raw


ContentBlock = TextBlock | ThinkingBlock | ToolUseBlock


class OutputTokensDetails(msgspec.Struct, frozen=True):
    """How many of the output's tokens were reasoning, its markers included."""

    thinking_tokens: int


class MessageUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts: `input_tokens` are those that no cache held."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails | msgspec.UnsetType = msgspec.UNSET


class Message(msgspec.Struct, frozen=True, kw_only=True, tag="message"):
    """Answer of `POST /v1/messages`."""

    id: str
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[ContentBlock]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage


class TokensCounted(msgspec.Struct, frozen=True):
    """Answer of `POST /v1/messages/count_tokens`."""

    input_tokens: int


class MessageStart(msgspec.Struct, frozen=True, tag="message_start"):
    """First event: the message without content."""

    message: Message


class BlockStart(msgspec.Struct, frozen=True, tag="content_block_start"):
    """A block opens, empty."""

    index: int
    content_block: ContentBlock


class TextDelta(msgspec.Struct, frozen=True, tag="text_delta"):
    """More text."""

    text: str


class ThinkingDelta(msgspec.Struct, frozen=True, tag="thinking_delta"):
    """More reasoning."""

    thinking: str


class SignatureDelta(msgspec.Struct, frozen=True, tag="signature_delta"):
    """The reasoning's signature, before its block closes."""

    signature: str


class InputJsonDelta(msgspec.Struct, frozen=True, tag="input_json_delta"):
    """A piece of a call's arguments as text."""

    partial_json: str


class BlockDelta(msgspec.Struct, frozen=True, tag="content_block_delta"):
    """A block grows."""

    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta


class BlockStop(msgspec.Struct, frozen=True, tag="content_block_stop"):
    """A block is whole."""

    index: int


class Stop(msgspec.Struct, frozen=True):
    """Why the message ended."""

    stop_reason: str | None
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, frozen=True, tag="message_delta"):
    """The message's ending and its final counts."""

    delta: Stop
    usage: MessageUsage


class MessageStop(msgspec.Struct, frozen=True, tag="message_stop"):
    """Last event."""


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Nothing new; the line is alive."""


class ErrorBody(msgspec.Struct, frozen=True):
    """What went wrong. `details` hold the code of an error on which the official client acts."""

    type: str
    message: str
    details: dict[str, Detail] | msgspec.UnsetType = msgspec.UNSET


class ErrorDocument(msgspec.Struct, frozen=True, tag="error"):
    """Every error, as an answer and as an event."""

    error: ErrorBody
    request_id: str


Event = (
    MessageStart
    | BlockStart
    | BlockDelta
    | BlockStop
    | MessageDelta
    | MessageStop
    | Ping
    | ErrorDocument
)


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True, tag="model", omit_defaults=True):
    """One entry of `GET /v1/models`; `created_at` is RFC 3339."""

    id: str
    display_name: str
    created_at: str
    lifecycle: str
    max_input_tokens: int | None = None
    max_tokens: int | None = None


class ModelPage(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `GET /v1/models`: always the whole list."""

    data: list[ModelInfo]
    has_more: bool = False
    first_id: str | None
    last_id: str | None


def usage_of(usage: Usage) -> MessageUsage:
    """Return token counts in this dialect."""
    cached = usage.prompt_tokens_details.cached_tokens
    details = usage.completion_tokens_details
    return MessageUsage(
        input_tokens=usage.prompt_tokens - cached,
        cache_read_input_tokens=cached,
        output_tokens=usage.completion_tokens,
        output_tokens_details=(
            msgspec.UNSET if details is None else OutputTokensDetails(details.reasoning_tokens)
        ),
    )


def error_status(error: CortexError) -> int:
    """Return the HTTP status this dialect has for an error.

    What a retry elsewhere or later mends is 529, which the official clients retry; a request that
    can never work is 400.
    """
    if error.http_status in {503, 507} or error.code == "queue_full":
        return OVERLOADED_STATUS
    return 400 if error.http_status == 422 else error.http_status


def error_document(error: CortexError, request_id: str) -> ErrorDocument:
    """Return the error envelope."""
    status = error_status(error)
    fallback = "invalid_request_error" if status < 500 else "api_error"
    kind = _TYPES_BY_STATUS.get(status, fallback)
    details = error.details if "error_code" in error.details else msgspec.UNSET
    return ErrorDocument(ErrorBody(kind, _message(error), details), request_id)


def _message(error: CortexError) -> str:
    """Return the text; agents know an overlong prompt by the original service's words."""
    most, prompt_len = error.details.get("max"), error.details.get("prompt_len")
    if isinstance(error, ContextLengthExceeded) and most and prompt_len:
        return f"prompt is too long: {prompt_len} tokens > {most} maximum"
    return error.message
