"""The OpenAI Responses API's documents: request body, the answer and its items.

Pure data, as `cortexd.openai`. Input items and tools stay free-form, since clients send kinds that
are newer than this program; `cortexd.translate_responses` reads them. Nothing is stored here, so
fields that only matter to a store (`store`, `metadata`, `include`, ...) are ignored.
Source: https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from cortexd.openai import CompletionTokensDetails as OutputTokensDetails
from cortexd.openai import (
    Effort,
    EngineFields,
    JsonObject,
    PromptTokensDetails,
    TokenCount,
    Turns,
    Usage,
)

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]


class Reasoning(msgspec.Struct, frozen=True):
    """How much the model should reason. How its reasoning is told is not for clients to say."""

    effort: Effort | None = None


class ResponsesRequest(EngineFields, frozen=True, kw_only=True):
    """Body of `POST /v1/responses`."""

    model: Annotated[str, Meta(min_length=1, max_length=512)] | None = None
    input: str | Turns | None = None
    instructions: str | None = None
    max_output_tokens: TokenCount | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    stream: bool | None = None
    text: JsonObject | None = None
    tools: list[JsonObject] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: JsonObject | None = None
    reasoning: Reasoning | None = None
    # Would change the answer, not supported: refused by name.
    background: bool | None = None
    conversation: Any = None
    previous_response_id: str | None = None
    prompt: Any = None
    top_logprobs: int | None = None


class OutputText(msgspec.Struct, frozen=True, tag="output_text"):
    """Words for the reader."""

    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class ReasoningText(msgspec.Struct, frozen=True, tag="reasoning_text"):
    """Words the model thinks with."""

    text: str


class MessageItem(msgspec.Struct, frozen=True, kw_only=True, tag="message"):
    """What the model says."""

    id: str
    status: ItemStatus
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class ReasoningItem(msgspec.Struct, frozen=True, kw_only=True, tag="reasoning"):
    """What the model thinks; there is no summary of it."""

    id: str
    status: ItemStatus
    summary: list[Any] = []
    content: list[ReasoningText]


class FunctionCallItem(msgspec.Struct, frozen=True, kw_only=True, tag="function_call"):
    """One call of a tool; `arguments` is a JSON object as text."""

    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem = MessageItem | ReasoningItem | FunctionCallItem


class ResponsesUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts."""

    input_tokens: int
    input_tokens_details: PromptTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(msgspec.Struct, frozen=True):
    """What a response failed with."""

    code: str
    message: str


class IncompleteDetails(msgspec.Struct, frozen=True):
    """Why a response ends early."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `POST /v1/responses`; also in the events that begin and end its stream."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: ResponseStatus
    model: str
    output: list[OutputItem]
    usage: ResponsesUsage | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    store: Literal[False] = False


def usage_of(usage: Usage) -> ResponsesUsage:
    """Return token counts in this dialect."""
    return ResponsesUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=usage.prompt_tokens_details,
        output_tokens=usage.completion_tokens,
        output_tokens_details=usage.completion_tokens_details or OutputTokensDetails(),
        total_tokens=usage.total_tokens,
    )
