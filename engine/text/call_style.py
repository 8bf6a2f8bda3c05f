"""How a model writes calls of tools: read from what its own template makes of one.

Known are JSON between `<tool_call>` markers (Hermes, Qwen), bare JSON with "parameters" (Llama 3),
the XML of Qwen's coders, with or without those markers, and Mistral's two forms. `read_call_style`
sees an example call as the template renders it, and the prompt that the tools make; a template
that renders neither in a known way leaves JSON, in markers if the model has them.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal

Form = Literal["json", "xml", "mistral_list", "mistral_args", "unknown"]

TOOL_CALL: Final = ("<tool_call>", "</tool_call>")
FUNCTION: Final = ("<function=", "</function>")
TOOL_CALLS: Final = "[TOOL_CALLS]"
ARGUMENTS: Final = "[ARGS]"
CALL_ID: Final = "[CALL_ID]"
EXAMPLE_NAME: Final = "cortexd_probe_tool"
# Mistral's templates want nine letters or digits.
EXAMPLE_ID: Final = "cortexd00"
_ARGUMENTS_KEY: Final = re.compile(rf'"{EXAMPLE_NAME}"\s*,\s*"(arguments|parameters)"\s*:')


@dataclass(slots=True, frozen=True)
class CallStyle:
    """The form of a call; `is_tagged` tells whether it stands between `<tool_call>` markers.

    `arguments_key` is the name that JSON has for the arguments, `has_call_id` whether Mistral's
    newer form puts an id between name and arguments.
    """

    form: Form
    is_tagged: bool = False
    arguments_key: str = "arguments"
    has_call_id: bool = False


def read_call_style(example: str, tool_prompt: str, added_tokens: Collection[str]) -> CallStyle:
    """Return the style; `example` and `tool_prompt` are "" when the template renders none."""
    is_tagged = all(token in added_tokens for token in TOOL_CALL) or any(
        TOOL_CALL[0] in text for text in (example, tool_prompt)
    )
    if FUNCTION[0] in example or (not example and FUNCTION[0] in tool_prompt):
        return CallStyle("xml", is_tagged)
    if TOOL_CALLS in example or (not example and TOOL_CALLS in added_tokens):
        rest = example.partition(TOOL_CALLS)[2].lstrip()
        if ARGUMENTS in rest or (rest.startswith(EXAMPLE_NAME) and not rest.startswith("[")):
            return CallStyle("mistral_args", has_call_id=CALL_ID in rest)
        return CallStyle("mistral_list")
    key = _ARGUMENTS_KEY.search(example)
    if key is not None and not is_tagged and not _is_bare(example, key.start()):
        return CallStyle("unknown")
    if key is None and EXAMPLE_NAME in example:
        return CallStyle("unknown", is_tagged)
    if key is None:
        return CallStyle("json", is_tagged, _key_in(tool_prompt) if not is_tagged else "arguments")
    return CallStyle("json", is_tagged, key[1])


def _key_in(tool_prompt: str) -> str:
    """Return the key that the instructions of a template without an example ask for."""
    return "parameters" if '"parameters": dictionary' in tool_prompt else "arguments"


def _is_bare(example: str, end: int) -> bool:
    """Tell whether the call is one JSON object with nothing of the model's own around it.

    What stands right before it is the turn's header: white space, or the end of a control token.
    """
    before = example[:end].rpartition("{")[0].rstrip()
    return not before.endswith(("[", "=", "(", "```json", "tool_call|>", "tool_call>"))
