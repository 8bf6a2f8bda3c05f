"""How a model writes calls is read from its template, for the families people run."""

from __future__ import annotations

import pytest

from engine.text.call_style import CallStyle, read_call_style
from engine.text.chat_template import ChatTemplate
from tests.engine.text.chat_templates import CHATML, HEADERS_WITH_BOS, THINKING_WITH_TOOLS

MARKERS = {"<tool_call>", "</tool_call>"}
_USER = "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% endif %}"
_CALLS = "{% for c in m.tool_calls or [] %}{% set f = c.function %}"
_END = "{% endfor %}{% endfor %}"
MISTRAL_LIST = (
    "[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]" + _USER + _CALLS + "[TOOL_CALLS] "
    '[{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}, "id": "{{ c.id }}"}]' + _END
)
MISTRAL_ARGS = (
    "{{ tools | tojson }}" + _USER + _CALLS + "[TOOL_CALLS]{{ f.name }}[ARGS]"
    "{{ f.arguments | tojson }}" + _END
)
MISTRAL_IDS = MISTRAL_ARGS.replace("[ARGS]", "[CALL_ID]{{ c.id }}[ARGS]")
CODER = (
    "{{ tools | tojson }} <tool_call>\n<function=example>" + _USER + _CALLS + "<tool_call>\n"
    "<function={{ f.name }}>{% for k, v in f.arguments.items() %}\n<parameter={{ k }}>\n{{ v }}\n"
    "</parameter>{% endfor %}\n</function>\n</tool_call>" + _END
)
PYTHONIC = "{{ tools }}" + _USER + _CALLS + "[{{ f.name }}(key='{{ f.arguments.key }}')]" + _END
GRANITE = (
    "{{ tools }}" + _USER + _CALLS + '<|tool_call|>[{"name": "{{ f.name }}", "arguments": '
    "{{ f.arguments | tojson }}}]" + _END
)


@pytest.mark.parametrize(
    ("source", "added", "style"),
    [
        (THINKING_WITH_TOOLS, MARKERS, CallStyle("json", is_tagged=True)),
        (THINKING_WITH_TOOLS, set(), CallStyle("json", is_tagged=True)),
        (HEADERS_WITH_BOS, set(), CallStyle("json", arguments_key="parameters")),
        (MISTRAL_LIST, {"[TOOL_CALLS]"}, CallStyle("mistral_list")),
        (MISTRAL_ARGS, {"[TOOL_CALLS]", "[ARGS]"}, CallStyle("mistral_args")),
        (MISTRAL_IDS, {"[TOOL_CALLS]"}, CallStyle("mistral_args", has_call_id=True)),
        (CODER, MARKERS, CallStyle("xml", is_tagged=True)),
        (CODER.replace("<tool_call>", "").replace("</tool_call>", ""), set(), CallStyle("xml")),
        (PYTHONIC, set(), CallStyle("unknown")),
        (GRANITE, set(), CallStyle("unknown")),
        (CHATML, MARKERS, CallStyle("json", is_tagged=True)),
        (CHATML, set(), CallStyle("json")),
    ],
)
def test_style_of_known_templates(source: str, added: set[str], style: CallStyle) -> None:
    """The template's own example of a call decides; without one, markers and JSON."""
    template = ChatTemplate({"default": source}, {"bos_token": "<s>"}, "test/model")
    assert read_call_style(template.call_example, template.tool_prompt or "", added) == style
