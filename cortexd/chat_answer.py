"""What another OpenAI-compatible server answers to a chat request: the fields that are read of it.

One shape for the whole answer (`message`) and for a stream's chunks (`delta`). Unknown fields are
ignored; `reasoning` is what some servers call `reasoning_content`, `stop_reason` is vLLM's name for
the stop string that ended the answer. None can be part of a cycle, so the garbage collector need
not know them: that halves the time of reading a chunk.
"""

from __future__ import annotations

from typing import Any

import msgspec

from cortexd.openai import PromptTokensDetails, Usage


class FunctionPart(msgspec.Struct, frozen=True, gc=False):
    """A call's name, and its arguments or a piece of them, as JSON text."""

    name: str | None = None
    arguments: str | None = None


class CallPart(msgspec.Struct, frozen=True, gc=False):
    """A call or a piece of one; `index` tells the calls of a stream apart."""

    index: int | None = None
    id: str | None = None
    function: FunctionPart = FunctionPart()


class Words(msgspec.Struct, frozen=True, gc=False):
    """A message, or what a chunk adds to it."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[CallPart] | None = None

    @property
    def thoughts(self) -> str:
        """Return the reasoning under either name."""
        return self.reasoning_content or self.reasoning or ""


class Choice(msgspec.Struct, frozen=True, gc=False):
    """The one choice that was asked for."""

    message: Words | None = None
    delta: Words | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Details(msgspec.Struct, frozen=True, gc=False):
    """What of the prompt came from a cache."""

    cached_tokens: int | None = None


class Counted(msgspec.Struct, frozen=True, gc=False):
    """The server's own counts."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: Details | None = None


class ChatDocument(msgspec.Struct, frozen=True, gc=False):
    """A whole answer, or one chunk of a stream."""

    choices: list[Choice] = []
    usage: Counted | None = None
    error: Any = None


def usage_from(counted: Counted | None, num_chunks: int = 0) -> Usage:
    """Return token counts; where the server gave none, the chunks with words are counted."""
    prompt = max((counted.prompt_tokens if counted else 0) or 0, 0)
    written = max((counted.completion_tokens if counted else num_chunks) or 0, 0)
    details = counted.prompt_tokens_details if counted else None
    cached = max((details.cached_tokens if details else 0) or 0, 0)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=written,
        total_tokens=prompt + written,
        prompt_tokens_details=PromptTokensDetails(min(cached, prompt)),
    )
