"""A text model of 256 byte tokens and an end token, with the interface of the real one."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from cortexd.errors import InvalidRequest, TemplateRenderFailed
from engine.text.answer_format import AnswerFormat, answer_format

EOS = 256
VOCAB_SIZE = 257


class ByteDetokenizer:
    """Decode bytes to text, whole characters only."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """Return the characters that are whole now."""
        return self._decoder.decode(bytes(ids))

    def flush(self) -> str:
        """Return what is left."""
        return self._decoder.decode(b"", final=True)


class ByteTextModel:
    """Token id = byte; the chat template is "role: content" lines, then the tools' names.

    `added_tokens` are the markers it is said to have; `opening` is what its template opens the
    answer with; `can_call_tools` False makes a template that leaves tools out.
    """

    eos_token_ids = (EOS,)

    def __init__(self, default_sampling: dict[str, Any] | None = None) -> None:
        self.default_sampling = default_sampling or {}
        self.rendered: list[list[dict[str, Any]]] = []
        self.rendered_tools: list[list[dict[str, Any]] | None] = []
        self.template_kwargs: list[dict[str, Any] | None] = []
        self.added_tokens: set[str] = set()
        self.opening = ""
        self.can_call_tools = True

    @property
    def can_reason(self) -> bool:
        """Tell whether there are markers for reasoning."""
        return "<think>" in self.added_tokens

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Return one line per message; a message "refuse" is refused as a template may."""
        self.rendered.append(messages)
        self.rendered_tools.append(tools)
        self.template_kwargs.append(template_kwargs)
        if any(message.get("content") == "refuse" for message in messages):
            raise InvalidRequest("messages: the chat template refused, as asked", param="messages")
        if tools and not self.can_call_tools:
            raise TemplateRenderFailed("the template does not render tools", param="tools")
        lines = [f"{message['role']}: {message.get('content')}" for message in messages]
        lines += [f"tool: {tool['function']['name']}" for tool in tools or []]
        return "\n".join([*lines, "assistant: " + self.opening])

    def answer_format(self, prompt: str, tools: list[dict[str, Any]] | None) -> AnswerFormat | None:
        """Return what the real one does."""
        return answer_format(self.added_tokens, prompt, tools)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the bytes."""
        return list(text.encode())

    def token_text(self, token_id: int) -> str | None:
        """Return the byte as a character."""
        return chr(token_id) if 0 <= token_id < EOS else None

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text."""
        return bytes(ids).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the token's byte."""
        return bytes([token_id])

    def detokenizer(
        self,
        *,
        skip_special_tokens: bool = True,
        shows_markers: bool = False,
        continues_text: bool = False,
    ) -> ByteDetokenizer:
        """Return a fresh detokenizer."""
        return ByteDetokenizer()
