"""The OpenAI API's documents: request bodies, responses, stream chunks, model cards, errors.

Pure data with ranges. The front decodes request bodies straight into these (so every range is
checked while parsing) and encodes its answers from them. `null` means absent in every request
field. Fields that other servers know and this one does not are ignored; fields that would change
the answer and are not supported are declared here, so that the front can refuse them by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

JsonObject = dict[str, Any]
# Anthropic's own bound; no context holds as many, and each costs time before that is found out.
Turns = Annotated[list[JsonObject], Meta(max_length=100_000)]

TokenCount = Annotated[int, Meta(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
# Templates know words of their own; "none" is to every model that it should not reason at all.
Effort = Annotated[str, Meta(min_length=1, max_length=32)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`stream_options` of a streaming request."""

    include_usage: bool | None = None


class EngineFields(msgspec.Struct, frozen=True, kw_only=True):
    """What every endpoint takes beyond its own API, under the names that open engines have."""

    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    logit_bias: dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=256)] | None = None
    bad_words: Annotated[list[StopString], Meta(max_length=256)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1, max_length=65536)] | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=512)] | None = None


class SamplingFields(EngineFields, frozen=True, kw_only=True):
    """How tokens are chosen: the fields that chat and legacy completions share."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None


class GenerationFields(SamplingFields, frozen=True, kw_only=True):
    """Sampling plus when to stop, how many answers, and how they are sent."""

    model: Annotated[str, Meta(min_length=1, max_length=512)] | None = None
    max_tokens: TokenCount | None = None
    n: Annotated[int, Meta(ge=1, le=16)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=16)] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    add_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # What the answer must be; the last four as vLLM has them.
    response_format: Any = None
    structured_outputs: Any = None
    guided_choice: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    # Known to OpenAI-compatible servers, would change the answer, not supported: refused by name.
    best_of: Annotated[int, Meta(ge=1)] | None = None
    guided_grammar: Any = None
    grammar: Any = None
    truncate_prompt_tokens: Any = None
    use_beam_search: bool | None = None
    # The same, but for the value that asks for what is done here anyway.
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None


class ChatCompletionRequest(GenerationFields, frozen=True, kw_only=True):
    """Body of `POST /v1/chat/completions`."""

    messages: Turns | None = None
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    chat_template_kwargs: JsonObject | None = None
    reasoning_effort: Effort | None = None
    tools: list[JsonObject] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    # As vLLM has them: the last message is the beginning of the answer; no turn is opened for it.
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    # Not supported, refused by name.
    chat_template: Any = None
    documents: Any = None
    echo: bool | None = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: list[str] | None = None
    web_search_options: Any = None


class CompletionRequest(GenerationFields, frozen=True, kw_only=True):
    """Body of `POST /v1/completions`. `prompt` is decoded in a second step: a union of lists."""

    prompt: msgspec.Raw = msgspec.Raw(b"null")
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """How many of the prompt's tokens came from the prefix cache."""

    cached_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """How many of the generated tokens were reasoning."""

    reasoning_tokens: int = 0


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One likely token. `bytes` are its own, which may be a piece of a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob, frozen=True, kw_only=True):
    """The chosen token with its most likely rivals."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """`logprobs` of a chat choice."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """`logprobs` of a legacy choice; the four lists run in parallel.

    The first token of an echoed prompt has no score.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """How likely one token was in its place of the prompt; `rank` counts from 1."""

    logprob: float
    rank: int
    decoded_token: str


# By token id; null for the first token, which follows nothing. Left out unless it was asked for.
PromptLogprobs = list[dict[str, PromptLogprob] | None] | msgspec.UnsetType


class FunctionCall(msgspec.Struct, frozen=True):
    """The function a tool call names; `arguments` is a JSON object as text."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """One call of a tool, whole."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True):
    """A call in a stream; it comes in one piece, since it is only known to be one at its end."""

    index: int
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The assistant's answer. What it does not have of reasoning and tool calls is left out."""

    role: str = "assistant"
    content: str | None = None
    refusal: None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One of `n` answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `POST /v1/chat/completions` without streaming."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs = msgspec.UNSET


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a chunk adds to the message."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One choice of a chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One `data:` event of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One legacy answer; also one choice of a legacy chunk."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    prompt_logprobs: PromptLogprobs = msgspec.UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `POST /v1/completions`; also one `data:` event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelLimit(msgspec.Struct, frozen=True, kw_only=True):
    """Token limits of a model; `input` leaves room for one generated token."""

    context: int
    input: int
    output: int


class ModelLocation(msgspec.Struct, frozen=True, kw_only=True):
    """A node that holds, or is getting, a model."""

    node: str
    status: str
    vram_estimate_mb: int | None = None


class ModelCost(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """US dollars per million tokens; 0: free on purpose."""

    input: float
    output: float
    cache_read: float | None = None
    cache_write: float | None = None


class ModelCard(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One entry of `GET /v1/models`. Unknown limits are omitted, never zero."""

    id: str
    object: str
    created: int
    owned_by: str
    loaded: bool
    feasible_on: list[str]
    locations: list[ModelLocation]
    capabilities: list[str]
    tool_call: bool
    reasoning: bool
    limit: ModelLimit | None = None
    max_model_len: int | None = None
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None
    alias_of: str | None = None
    progress: float | None = None
    stage: str | None = None
    eta_s: float | None = None
    error: str | None = None
    cost: ModelCost | None = None


class ModelCards(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
