"""Refuses messages that a model's chat template would leave out without a word.

Many templates write the roles they know and pass over all others, or write no tool calls; the model
would answer as if nothing had been said. What a template does is found by trying it, once for each
role. Owned by its `ChatTemplate`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from cortexd.errors import TemplateRenderFailed
from engine.text.call_style import EXAMPLE_ID

Message = dict[str, Any]
# Renders a conversation with or without a tool, None when the template refuses it.
Run = Callable[[list[Message], bool], str | None]

_PROBE: Final = "cortexd probe text"
_CALLED: Final = "cortexd_probe_call"  # not the name of the tool that is described
_USER: Final[Message] = {"role": "user", "content": "hello"}
# OpenAI's name for what its newer models are told first; most templates know the older one only.
_DEVELOPER: Final = "developer"
_SYSTEM: Final = "system"
_LEADING: Final = (_SYSTEM, _DEVELOPER)
_RESULTS: Final = ("tool", "function")
_ANSWERED: Final = ("user", "assistant")
# Clients may invent roles: only so many are remembered, and none that is no name.
_MAX_KNOWN_ROLES: Final = 32
_MAX_ROLE_CHARACTERS: Final = 64


class DroppedMessages:
    """What one template leaves out."""

    def __init__(self, run: Run, model_id: str) -> None:
        self._run = run
        self._model_id = model_id
        # By role and whether there are tools; None where the template refuses what is tried.
        self._are_written: dict[tuple[str, bool], bool | None] = {}
        self._are_calls_written: dict[bool, bool | None] = {}

    def check(self, messages: list[Message], *, has_tools: bool) -> list[Message]:
        """Return the messages as the template takes them: `developer` as `system` if it must be.

        Raises: TemplateRenderFailed for the first that it would leave out.
        """
        return [self._checked(index, one, has_tools) for index, one in enumerate(messages)]

    def _checked(self, index: int, message: Message, has_tools: bool) -> Message:
        role = message["role"]
        if message.get("tool_calls") and self._writes_calls(has_tools) is False:
            raise self._failure("tool calls", f"messages[{index}].tool_calls")
        if role in _ANSWERED or self._writes(role, has_tools) is not False:
            return message
        if role == _DEVELOPER and self._writes(_SYSTEM, has_tools) is not False:
            return {**message, "role": _SYSTEM}
        raise self._failure(f'the role "{role[:40]}"', f"messages[{index}].role")

    def _writes(self, role: str, has_tools: bool) -> bool | None:
        """Tell whether what a role says reaches the prompt."""
        known = self._are_written
        if (role, has_tools) in known:
            return known[role, has_tools]
        text = self._run(_conversation_with(role), has_tools)
        is_written = None if text is None else _PROBE in text
        if len(role) <= _MAX_ROLE_CHARACTERS:
            if len(known) >= _MAX_KNOWN_ROLES:
                known.clear()
            known[role, has_tools] = is_written
        return is_written

    def _writes_calls(self, has_tools: bool) -> bool | None:
        """Tell whether a call's name reaches the prompt, with one thing or another for no words."""
        known = self._are_calls_written
        if has_tools not in known:
            turns = [[_USER, {**_call(), "content": content}] for content in ("", None)]
            texts = [self._run(messages, has_tools) for messages in turns]
            taken = [text for text in texts if text is not None]
            known[has_tools] = any(_CALLED in text for text in taken) if taken else None
        return known[has_tools]

    def _failure(self, what: str, param: str) -> TemplateRenderFailed:
        return TemplateRenderFailed(
            f'the chat template of model "{self._model_id}" leaves out {what} ({param}); use a '
            "model that knows it, or say it in another role",
            param=param,
        )


def _conversation_with(role: str) -> list[Message]:
    said = {"role": role, "content": _PROBE}
    if role in _LEADING:
        return [said, _USER]
    if role in _RESULTS:
        result = {**said, "tool_call_id": EXAMPLE_ID, "name": _CALLED}
        return [_USER, {**_call(), "content": ""}, result]
    return [_USER, said]


def _call() -> Message:
    function = {"name": _CALLED, "arguments": {"key": "value"}}
    calls = [{"id": EXAMPLE_ID, "type": "function", "function": function}]
    return {"role": "assistant", "tool_calls": calls}
