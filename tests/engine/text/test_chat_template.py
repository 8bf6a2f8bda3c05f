"""Templates render as transformers renders them; hostile ones end soon with an error."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from cortexd.errors import (
    InvalidRequest,
    InvalidType,
    InvalidValue,
    TemplateRenderFailed,
    UnsupportedParameter,
)
from engine.text import template_sandbox
from engine.text.chat_template import ChatTemplate
from engine.text.render_time import SlowTemplateError, quick_render
from tests.engine.text.chat_templates import (
    CHATML,
    HEADERS_WITH_BOS,
    PARTS,
    PARTS_BY_PRINTING,
    THINKING_WITH_TOOLS,
)

Messages = list[dict[str, Any]]

USER: dict[str, Any] = {"role": "user", "content": 'Grüße <b>"you"</b> & 你好 <|im_end|>  '}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "f", "description": "<é> & 'x'", "parameters": {}}}
]
CALL: dict[str, Any] = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "1",
            "type": "function",
            "function": {"name": "f", "arguments": {"b": "é<>", "a": [1, None]}},
        }
    ],
}
CONVERSATIONS: list[Messages] = [
    [USER],
    [{"role": "system", "content": "Be\nbrief"}, USER, {"role": "assistant", "content": "ok"}],
    [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}, USER],
    [USER, CALL, {"role": "tool", "content": "42"}, {"role": "tool", "content": "43"}],
    [USER, {"role": "assistant", "content": "a", "reasoning": "because"}],
]
VARIABLES = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}


def _template(source: str, **named: str) -> ChatTemplate:
    return ChatTemplate({"default": source, **named}, VARIABLES, "test/model")


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize(
    "source", [CHATML, THINKING_WITH_TOOLS, HEADERS_WITH_BOS], ids=["chatml", "qwen", "llama"]
)
def test_render_agrees_with_transformers(
    source: str, conversation: Messages, tools: list[dict[str, Any]] | None
) -> None:
    """The same conversation gives the same prompt, or fails in both."""
    for kwargs in ({}, {"enable_thinking": False, "date_string": "1 Jan 2025"}):
        try:
            rendered, _ = render_jinja_template(
                [conversation],
                tools=tools,
                chat_template=source,
                add_generation_prompt=True,
                **VARIABLES,
                **kwargs,
            )
        except TypeError:  # CHATML adds a None content to a string
            with pytest.raises(InvalidRequest):
                _template(source).render(conversation, tools=tools, template_kwargs=kwargs)
            continue
        ours = _template(source).render(conversation, tools=tools, template_kwargs=kwargs)
        assert ours == rendered[0]


def test_render_tool_use_template_is_taken_with_tools() -> None:
    """A model with a template for tools uses it only when the request has tools."""
    template = _template("plain", tool_use="with {{ tools|length }} tools")
    assert template.render([USER]) == "plain"
    assert template.render([USER], tools=[]) == "plain"
    assert template.render([USER], tools=TOOLS) == "with 1 tools"


def test_render_string_arguments_become_objects() -> None:
    """Arguments as OpenAI clients send them, JSON in a string, are parsed before rendering."""
    call = {"function": {"name": "f", "arguments": '{"b": "é<>", "a": [1, null]}'}}
    messages = [USER, {"role": "assistant", "tool_calls": [call]}]
    assert _template(THINKING_WITH_TOOLS).render(messages) == (
        _template(THINKING_WITH_TOOLS).render([USER, CALL])
    )
    assert call["function"]["arguments"] == '{"b": "é<>", "a": [1, null]}'


@pytest.mark.parametrize(
    ("message", "error", "param"),
    [
        ("no object", InvalidType, "messages[0]"),
        ({"role": "user", "content": ["x"]}, InvalidType, "messages[0].content[0]"),
        ({"role": "user", "content": 3}, InvalidType, "messages[0].content"),
        ({"content": "x"}, InvalidRequest, "messages[0].role"),
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            UnsupportedParameter,
            "messages[0].content[0].type",
        ),
        (
            {"role": "user", "content": [{"type": "text"}]},
            InvalidType,
            "messages[0].content[0].text",
        ),
        (
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "f", "arguments": "{"}}],
            },
            InvalidValue,
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]},
            InvalidValue,
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"role": "assistant", "tool_calls": [{}]}, InvalidType, None),
        ({"role": "assistant", "tool_calls": "x"}, InvalidType, "messages[0].tool_calls"),
    ],
)
def test_render_malformed_message_names_the_field(
    message: Any, error: type[InvalidRequest], param: str | None
) -> None:
    """Each malformed part of a message is refused with its path."""
    with pytest.raises(error) as caught:
        _template(CHATML).render([message])
    assert param is None or caught.value.param == param


@pytest.mark.parametrize("source", [CHATML, THINKING_WITH_TOOLS, PARTS_BY_PRINTING])
def test_render_text_parts_are_joined_for_string_templates(source: str) -> None:
    """Templates that expect strings get the parts' text, one part a line."""
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert _template(source).render([{"role": "user", "content": parts}]) == (
        _template(source).render([{"role": "user", "content": "one\ntwo"}])
    )


def test_render_text_parts_reach_templates_that_iterate() -> None:
    """A template that goes over parts itself gets them as they are."""
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "<one>" in _template(PARTS).render([{"role": "user", "content": parts}])


def test_render_missing_content_is_empty() -> None:
    """A null content without tool calls renders as an empty turn."""
    text = _template(CHATML).render([USER, {"role": "assistant", "content": None}])
    assert "<|im_start|>assistant\n<|im_end|>" in text


@pytest.mark.parametrize("messages", [[], None, "hi", {}])
def test_render_no_list_of_messages_is_refused(messages: Any) -> None:
    """There must be something to answer."""
    with pytest.raises(InvalidValue, match="non-empty list"):
        _template(CHATML).render(messages)


def test_render_without_template_says_what_works() -> None:
    """No template is guessed; the error points at the completions route."""
    with pytest.raises(InvalidRequest, match="has no chat template; use /v1/completions"):
        ChatTemplate({}, {}, "m").render([USER])


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for x in %}", "line 1"),
        ("{{ messages[0].content.nothing.at_all }}", "has no attribute 'nothing'"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{% include 'other' %}", "no loader"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set x = namespace(_a=1) %}", "underscore"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ (" * 500, "render this conversation"),
    ],
)
def test_render_template_failure_is_the_callers_error(source: str, text: str) -> None:
    """Whatever a template raises becomes an InvalidRequest with the template's own words."""
    with pytest.raises(InvalidRequest) as caught:
        _template(source).render([USER])
    assert text in caught.value.message
    assert 'model "test/model"' in caught.value.message


LOOP = "{% for a in range(100000) %}"
HOSTILE = [
    f"{LOOP}{LOOP}{LOOP}{{% endfor %}}{{% endfor %}}{{% endfor %}}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
]
LARGE = [
    "{{ 'x' * 10 ** 12 }}",
    "{{ [0] * (10 ** 12) }}",
    "{{ 7 ** (10 ** 9) }}",
    "{% set ns = namespace(s='x') %}{% for a in range(99) %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='x') %}{% for a in range(99) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='x') %}{% for a in range(99) %}"
    "{% set ns.s = ns.s.replace('x', ns.s ~ 'x') %}{% endfor %}",
    "{% set ns = namespace(s='x') %}{% for a in range(99) %}"
    "{% set ns.s = ns.s | replace('x', ns.s ~ 'x') %}{% endfor %}",
    "{% set ns = namespace(s='xy') %}{% for a in range(99) %}"
    "{% set ns.s = ns.s.join([ns.s, ns.s]) %}{% endfor %}",
    "{% set ns = namespace(s='xy') %}{% for a in range(99) %}"
    "{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}",
    "{% set ns = namespace(s='xy') %}{% for a in range(99) %}"
    "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
    "{{ 'x'.ljust(10 ** 12) }}",
    "{{ 'x' | center(10 ** 12) }}",
    "{{ 'x' | indent(10 ** 12, first=true) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (10 ** 10, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=10 ** 9) }}",
    "{{ [[1], [2]] | sum(start=[]) }}",
    "{{ [1] | batch(10 ** 12, 0) | list }}",
    "{{ [[1]] | tojson(indent=10 ** 9) }}",
    f"{LOOP}{{{{ messages[0].content * 100 }}}}{{% endfor %}}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_render_endless_template_ends_at_the_deadline(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nested loops and recursion that would run for years are stopped."""
    monkeypatch.setattr(template_sandbox, "MAX_RENDER_S", 0.05)
    with pytest.raises(InvalidRequest, match=r"ran for more than 0\.05 s"):
        _template(source).render([USER])


def test_render_is_not_charged_for_the_time_that_others_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a busy machine a thread may stand still for long."""

    class Busy:
        """Each look at the clock is a minute after the one before, of which we had none."""

        minutes = itertools.count()
        thread_time = time.thread_time

        @classmethod
        def monotonic(cls) -> float:
            return 60.0 * next(cls.minutes)

    monkeypatch.setattr(template_sandbox, "time", Busy)
    assert _template(CHATML).render([USER])


@pytest.mark.parametrize("source", LARGE)
def test_render_large_value_is_refused_before_it_is_built(source: str) -> None:
    """No single operation may take memory out of proportion."""
    with pytest.raises(InvalidRequest, match=r"the template|numbers|indent"):
        _template(source).render([{"role": "user", "content": "abcdefgh"}])


def test_render_ordinary_formatting_is_allowed() -> None:
    """Formats with small widths, stars and escaped braces are no attack."""
    source = (
        "{{ '%5d%% * %s' % (7, 100000) }} {{ '{{{:>4}}} *'.format('é') }} {{ '%s' | format(1) }}"
    )
    assert _template(source).render([USER]) == "    7% * 100000 {   é} * 1"


def test_render_reserved_kwargs_are_refused() -> None:
    """A request may not replace its own messages through template arguments."""
    with pytest.raises(InvalidRequest, match="'messages' cannot be set"):
        _template(CHATML).render([USER], template_kwargs={"messages": []})


def test_render_with_kwargs_may_drop_the_generation_prompt() -> None:
    """Template arguments override the defaults."""
    text = _template(CHATML).render([USER], template_kwargs={"add_generation_prompt": False})
    assert not text.endswith("assistant\n")


@pytest.mark.parametrize(
    ("source", "begin"),
    [
        (CHATML, "<|im_end|>"),
        (THINKING_WITH_TOOLS, "<|im_end|>"),
        (HEADERS_WITH_BOS, "<|eot_id|>"),
        ("{{ raise_exception('never') }}", ""),
    ],
)
def test_text_after_answer_begins_with_the_turn_end(source: str, begin: str) -> None:
    """The probe finds what ends an assistant's turn, and survives a template that fails."""
    assert _template(source).text_after_answer().startswith(begin)


def test_quick_render_gives_up_early_and_is_no_refusal() -> None:
    """On an event loop a slow template is left to a thread, where it has its full time."""
    with pytest.raises(SlowTemplateError), quick_render():
        _template(HOSTILE[0]).render([USER])
    with quick_render():
        assert _template("{{ messages[0].content }}").render([USER]) == USER["content"]


_ROLES = "{% for m in messages %}<{{ m.role }}>"
_NAMES = "{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # Null cannot be added to text.
        (_ROLES + "{{ m.content + '' }}" + _NAMES + "{% endfor %}", "<assistant>[f]"),
        # Null is printed.
        (_ROLES + "{{ m.content | trim }}" + _NAMES + "{% endfor %}", "<assistant>[f]"),
        # The call is only written where content is null.
        (
            _ROLES + "{% if m.content is none %}" + _NAMES + "{% else %}{{ m.content }}{% endif %}"
            "{% endfor %}",
            "<assistant>[f]",
        ),
    ],
)
@pytest.mark.parametrize("content", [None, ""])
def test_call_without_words_is_given_as_the_template_takes_it(
    template: str, expected: str, content: str | None
) -> None:
    """Clients send null or nothing, the other dialects' translations nothing; both are the same."""
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [USER, {"role": "assistant", "content": content, "tool_calls": [call]}]
    text = ChatTemplate({"default": template}, {}, "org/model").render(messages)
    assert text.endswith(expected)


def test_message_that_a_template_leaves_out_is_refused() -> None:
    """A role that it passes over, tool calls that it does not write: named, never dropped."""
    qwen, chatml = _template(THINKING_WITH_TOOLS), _template(CHATML)
    for messages, what, param in (
        ([{"role": "wizard", "content": "abra"}, USER], 'the role "wizard"', "messages[0].role"),
        ([USER, {"role": "function", "content": "42"}], 'the role "function"', "messages[1].role"),
    ):
        with pytest.raises(TemplateRenderFailed, match=what) as caught:
            qwen.render(messages)
        assert caught.value.param == param
        assert messages[-1]["content"] in chatml.render(messages)
    with pytest.raises(TemplateRenderFailed, match="leaves out tool calls") as caught:
        chatml.render([USER, {**CALL, "content": ""}, {"role": "tool", "content": "42"}])
    assert caught.value.param == "messages[1].tool_calls"


def test_developer_is_system_where_the_template_knows_no_better() -> None:
    """OpenAI's newer name for the same; a template that writes it gets it as it is."""
    said = {"content": "Be brief"}
    qwen, chatml = _template(THINKING_WITH_TOOLS), _template(CHATML)
    as_system = qwen.render([{"role": "system", **said}, USER])
    assert qwen.render([{"role": "developer", **said}, USER]) == as_system
    assert "developer\nBe brief" in chatml.render([{"role": "developer", **said}, USER])


def test_what_a_template_writes_with_tools_only_is_taken_with_them() -> None:
    """It is tried as it will be rendered."""
    source = (
        "{% for m in messages %}{% if m.role == 'user' or tools %}{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}"
        "{% endif %}{% endfor %}{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    )
    template = _template(source)
    messages = [USER, CALL, {"role": "tool", "content": "42"}]
    assert "42" in template.render(messages, tools=TOOLS)
    with pytest.raises(TemplateRenderFailed):
        template.render(messages)
