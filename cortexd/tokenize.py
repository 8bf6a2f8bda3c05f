"""The documents of `/tokenize` and `/detokenize`, as vLLM has them. Pure data.

Source: vLLM's protocol of its tokenization endpoints. A conversation is described by the very
fields that a chat request has, so that what is tokenised is what a chat would send.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from cortexd.openai import ChatCompletionRequest, TokenId


class TokenizeRequest(ChatCompletionRequest, frozen=True, kw_only=True):
    """Body of `POST /tokenize`: either `prompt` or `messages`."""

    prompt: str | None = None
    return_token_strs: bool | None = None
    # Those of llama-server, whose answers look different: refused by name.
    content: Any = None
    add_special: Any = None
    parse_special: Any = None
    with_pieces: Any = None


class TokenizeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `POST /tokenize`; `max_model_len` is null while no engine has derived it."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of `POST /detokenize`."""

    model: Annotated[str, Meta(min_length=1, max_length=512)] | None = None
    tokens: list[TokenId] | None = None


class DetokenizeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `POST /detokenize`."""

    prompt: str
