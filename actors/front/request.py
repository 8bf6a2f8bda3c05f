"""A validated inference request: what both dialects reduce their bodies to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from actors.front.structure import Structure
from cortexd.openai import GenerationFields

Prompt = str | list[int]


@dataclass(slots=True, frozen=True)
class InferenceRequest:
    """One request, fully checked; nothing in it needs another look before tokenising.

    Exactly one of `messages` and `prompts` is set. `num_logprobs` is -1 for none, and so is
    `num_prompt_logprobs`. With `is_echoed` an answer begins with its prompt. `tools` are those the
    model may call, in OpenAI's form; `structure` is what the answer must be; `call_ending` is the
    finish reason of one that calls tools; `prefill` is its beginning, given by the client.
    """

    kind: Literal["chat", "completion"]
    model: str
    fields: GenerationFields
    max_tokens: int | None
    stop: tuple[str, ...]
    num_logprobs: int
    num_prompt_logprobs: int = -1
    is_echoed: bool = False
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    structure: Structure | None = None
    is_single_tool_call: bool = False
    call_ending: str = "tool_calls"
    template_kwargs: dict[str, Any] | None = None
    prefill: str = ""
    prompts: list[Prompt] = field(default_factory=list)

    @property
    def is_stream(self) -> bool:
        """Tell whether the client wants server-sent events."""
        return self.fields.stream is True

    @property
    def include_usage(self) -> bool:
        """Tell whether the client wants a usage chunk at the end of the stream."""
        options = self.fields.stream_options
        return options is not None and options.include_usage is True

    @property
    def choices_per_prompt(self) -> int:
        """Return `n`."""
        return self.fields.n or 1

    @property
    def echo_top(self) -> int:
        """Return how many likely tokens are told for each echoed one, -1 for no scores at all."""
        return self.num_logprobs if self.is_echoed else -1

    @property
    def continues_text(self) -> bool:
        """Tell whether the answer goes on with text of the prompt instead of opening a turn."""
        return self.kind == "completion" or bool(self.prefill)
