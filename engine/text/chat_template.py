"""Render a conversation with the template that came with the model, as Hugging Face does.

`ChatTemplate` holds the sources of one model's templates, compiles each once, on first use, and
may be used from several threads. A template is foreign code: whatever it raises becomes an
`InvalidRequest` with the template's own message, and `template_sandbox` bounds what it can cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Final

import jinja2

from cortexd.errors import CortexError, InvalidRequest, TemplateRenderFailed
from engine.text.call_style import EXAMPLE_ID, EXAMPLE_NAME
from engine.text.chat_messages import (
    Message,
    NoWords,
    has_parts,
    has_wordless_calls,
    prepare_messages,
)
from engine.text.dropped_messages import DroppedMessages
from engine.text.render_time import SlowTemplateError
from engine.text.template_bounds import check_length
from engine.text.template_sandbox import TemplateEnvironment, start_deadline

_PROBE: Final = "cortexd probe text"
_PROBE_TOOL: Final = EXAMPLE_NAME
_RESERVED_KWARGS: Final = frozenset({"messages", "tools"})


class ChatTemplate:
    """The chat templates of one model.

    `sources` maps a name to a Jinja source: "default", and perhaps "tool_use", which is taken when
    a request has tools. `variables` are `bos_token` and its like; `origin` is where the sources
    stand, for errors.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        variables: Mapping[str, str],
        model_id: str,
        origin: str = "",
    ) -> None:
        self._sources = dict(sources)
        self._variables = dict(variables)
        self._model_id = model_id
        self._origin = origin
        self._compiled: dict[str, jinja2.Template] = {}
        self._dropped = DroppedMessages(self._try_with, model_id)

    def render(
        self,
        messages: list[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt text, control tokens spelled out.

        Raises: InvalidRequest when there is no template, or it refuses the conversation;
        TemplateRenderFailed when it would leave out a message.
        """
        if not self._sources:
            raise InvalidRequest(
                f'model "{self._model_id}" has no chat template; use /v1/completions with a '
                "prompt in the model's own format",
                param="messages",
            )
        kwargs = dict(template_kwargs or {})
        reserved = _RESERVED_KWARGS & kwargs.keys()
        if reserved:
            raise InvalidRequest(
                f"chat_template_kwargs: {sorted(reserved)[0]!r} cannot be set here",
                param="chat_template_kwargs",
            )
        accepts_parts = has_parts(messages) and self._accepts_parts
        no_words: NoWords = self._no_words if has_wordless_calls(messages) else "as sent"
        prepared = self._dropped.check(
            prepare_messages(messages, accepts_parts=accepts_parts, no_words=no_words),
            has_tools=bool(tools),
        )
        return self._run(
            {
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                **self._variables,
                **kwargs,
                "messages": prepared,
                "tools": tools or None,
            }
        )

    def check_tools(self, text: str, tools: list[dict[str, Any]]) -> None:
        """Refuse a prompt without its tools: the model would answer as if there were none.

        Raises: TemplateRenderFailed.
        """
        names = [tool["function"]["name"] for tool in tools]
        missing = [name for name in names if name not in text]
        if names and not missing and self._tool_probe is False:
            missing = names  # it is the conversation that spells the names
        if missing:
            raise TemplateRenderFailed(
                f'the chat template of model "{self._model_id}" does not render tools (not in the '
                f"prompt: {', '.join(missing[:5])}); use a model that was trained for tools, or "
                "leave tools out",
                param="tools",
            )

    @property
    def renders_tools(self) -> bool:
        """Whether a tool's name reaches the prompt; False without a template."""
        return self._tool_probe is True

    @property
    def _tool_probe(self) -> bool | None:
        """Whether a template writes a tool's name, None when it refuses the conversation tried."""
        return None if self.tool_prompt is None else _PROBE_TOOL in self.tool_prompt

    @cached_property
    def tool_prompt(self) -> str | None:
        """The prompt of a conversation with one tool, None when the template refuses it."""
        return self._run_probe([], add_generation_prompt=True)

    @cached_property
    def call_example(self) -> str:
        """What the template makes of an answer that calls a tool, "" when it makes nothing."""
        return self._call_probe("") or self._call_probe(None)

    @cached_property
    def _no_words(self) -> NoWords:
        """What the template takes for no words beside tool calls.

        Some write calls only where content is null, others fail on null, or print it as "None". One
        that writes none at all gets what was sent, and may refuse it.
        """
        text = self._call_probe(None)
        if text and "None" not in text and "null" not in text:
            return "null"
        return "empty" if self._call_probe("") else "as sent"

    def _call_probe(self, content: str | None) -> str:
        """Return what becomes of an answer of a call and this content, "" without the call."""
        function = {"name": _PROBE_TOOL, "arguments": {"key": "value"}}
        calls = [{"id": EXAMPLE_ID, "type": "function", "function": function}]
        message = {"role": "assistant", "content": content, "tool_calls": calls}
        text = self._run_probe([message], add_generation_prompt=False) or ""
        # What comes before the question describes the tool; the call follows it.
        example = text.rpartition(_PROBE)[2]
        return example if _PROBE_TOOL in example else ""

    def _run_probe(self, turns: list[Message], *, add_generation_prompt: bool) -> str | None:
        asked = [{"role": "user", "content": _PROBE}, *turns]
        return self._try_with(asked, True, add_generation_prompt=add_generation_prompt)

    def _try_with(
        self, messages: list[Message], has_tools: bool, *, add_generation_prompt: bool = False
    ) -> str | None:
        """Return what the template makes of a conversation of ours, None when it refuses it."""
        function = {"name": _PROBE_TOOL, "description": "", "parameters": {"type": "object"}}
        try:
            return self._run(
                {
                    **self._variables,
                    "messages": messages,
                    "tools": [{"type": "function", "function": function}] if has_tools else None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except InvalidRequest:
            return None

    @cached_property
    def _accepts_parts(self) -> bool:
        """Whether the template writes the text of content given as a list of parts.

        Templates for strings either fail on a list, drop it or print it as Python would; all three
        show when it is tried.
        """
        part = {"type": "text", "text": _PROBE}
        text = self._try_with([{"role": "user", "content": [part]}], False) or ""
        return _PROBE in text and "'type'" not in text and '"type"' not in text

    def text_after_answer(self) -> str:
        """Return what the template writes after an assistant's answer, "" when it cannot tell.

        Its first control token is the one with which the model ends its turn.
        """
        messages = [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": _PROBE},
        ]
        try:
            text = self.render(messages, add_generation_prompt=False)
        except CortexError:
            return ""
        return text.rpartition(_PROBE)[2] if _PROBE in text else ""

    def _run(self, variables: dict[str, Any]) -> str:
        name = "tool_use" if variables["tools"] and "tool_use" in self._sources else "default"
        try:
            start_deadline()
            pieces: list[str] = []
            length = 0
            for piece in self._compile(name).generate(variables):
                length += len(piece)
                check_length(length)
                pieces.append(piece)
            return "".join(pieces)
        except SlowTemplateError:
            raise
        except jinja2.TemplateSyntaxError as error:
            # The file's fault, not the conversation's.
            where = (
                f"{self._origin}, line {error.lineno}" if self._origin else f"line {error.lineno}"
            )
            raise self._failure(f"{where}: {error.message}") from error
        except jinja2.TemplateError as error:
            raise self._failure(error.message or type(error).__name__) from error
        except Exception as error:  # foreign code may raise anything, RecursionError included
            raise self._failure(f"{type(error).__name__}: {error}") from error

    def _compile(self, name: str) -> jinja2.Template:
        template = self._compiled.get(name)
        if template is None:
            source = self._sources.get(name) or next(iter(self._sources.values()))
            template = TemplateEnvironment().compile_template(source)
            self._compiled[name] = template
        return template

    def _failure(self, cause: str) -> InvalidRequest:
        return InvalidRequest(
            f'the chat template of model "{self._model_id}" cannot render this conversation: '
            f"{cause}",
            param="messages",
        )
