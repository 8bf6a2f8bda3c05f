"""The grammar of tool calls: any number of them, or one, as the model's own template writes them.

Called by the fronts when a request forces a call. Arguments follow each tool's schema. In the XML
form a string stands as it is between its tags, so its schema becomes a regular expression; a value
of any other type is JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from cortexd.errors import UnsupportedParameter
from engine.grammar.source import JsonObject, choice, json_value, literal, regex
from engine.text.call_style import (
    ARGUMENTS,
    CALL_ID,
    TOOL_CALL,
    TOOL_CALLS,
    CallStyle,
)
from engine.text.schema_types import declared_types, resolved

# A random model would never stop; OpenAI's own service makes a few at most.
MAX_CALLS: Final = 32
_CLOSING: Final = literal("\n</parameter>\n")
_NO_CLOSING: Final = r"~/(?s:.*)<\/parameter>(?s:.*)/"


class CallGrammar:
    """Collects the rules of one request's calls.

    `schemas` maps a tool's name to the checked schema of its arguments, `paths` to where the client
    wrote it.
    """

    def __init__(
        self, style: CallStyle, schemas: Mapping[str, JsonObject], paths: Mapping[str, str]
    ) -> None:
        self._style = style
        self._schemas = schemas
        self._paths = paths
        self.rules: list[str] = []

    def expression(self, *, is_single: bool) -> str:
        """Return the expression of the calls; `rules` then holds what it refers to.

        Raises: UnsupportedParameter when the style, or a schema in it, cannot be forced.
        """
        style = self._style
        if style.form == "unknown":
            raise UnsupportedParameter(
                "tool_choice: calls cannot be forced on this model, whose template writes them in "
                "a form that is not known here; use tool_choice auto",
                param="tool_choice",
            )
        each = [self._call(index, name) for index, name in enumerate(self._schemas)]
        self._rule("call", " | ".join(each))
        more = MAX_CALLS - 1
        if style.form == "mistral_list":
            rest = "" if is_single else rf' (", " call){{0,{more}}}'
            return f'{literal(TOOL_CALLS)} /[ ]?/ "[" call{rest} "]"'
        if is_single or not (style.is_tagged or style.form == "mistral_args"):
            return "call"  # a bare call is the whole answer
        gap = "" if style.form == "mistral_args" else r"/\n{1,2}/ "
        return rf"call ({gap}call){{0,{more}}}"

    def _rule(self, name: str, body: str) -> None:
        self.rules.append(f"{name}: {body}")

    def _call(self, index: int, name: str) -> str:
        """Add the rule of one tool's call; return its name."""
        rule = f"call_{index}"
        if self._style.form == "xml":
            self._rule(rule, self._xml(index, name))
            return rule
        arguments = f"arguments_{index}"
        self._rule(arguments, json_value(object_schema(self._schemas[name])))
        if self._style.form == "mistral_args":
            call_id = f"{literal(CALL_ID)} /[A-Za-z0-9]{{9}}/ " if self._style.has_call_id else ""
            head = f"{literal(TOOL_CALLS + name)} {call_id}{literal(ARGUMENTS)}"
            self._rule(rule, f"{head} {arguments}")
            return rule
        key = self._style.arguments_key
        head, tail = f'{{"name": "{name}", "{key}": ', "}"
        if self._style.is_tagged:
            head, tail = f"{TOOL_CALL[0]}\n{head}", f"{tail}\n{TOOL_CALL[1]}"
        self._rule(rule, f"{literal(head)} {arguments} {literal(tail)}")
        return rule

    def _xml(self, index: int, name: str) -> str:
        schema = object_schema(self._schemas[name])
        properties = _properties(schema)
        required = schema.get("required")
        names = list(properties)
        names += [one for one in required or [] if isinstance(one, str) and one not in properties]
        parts = []
        for position, key in enumerate(names):
            rule = f"parameter_{index}_{position}"
            path = f"{self._paths[name]}.properties.{key}"
            value = self._xml_value(rule, key, properties.get(key, {}), schema, path)
            head = literal(f"<parameter={key}>\n")
            self._rule(rule, f"{head} {value}")
            parts.append(rule if key in (required or []) else f"{rule}?")
        start, end = f"<function={name}>\n", "</function>"
        if self._style.is_tagged:
            start, end = f"{TOOL_CALL[0]}\n{start}", f"{end}\n{TOOL_CALL[1]}"
        return " ".join([literal(start), *parts, literal(end)])

    def _xml_value(self, rule: str, key: str, schema: object, root: JsonObject, path: str) -> str:
        if not key or set(key) & set("<> \t\r\n"):
            raise UnsupportedParameter(
                f"{path}: the name cannot be written in this model's calls; use letters, digits "
                "and _",
                param=path,
            )
        found = resolved(schema, root)
        kinds = declared_types(schema, root)
        if "string" not in kinds and kinds:
            shared: JsonObject = {
                name: root[name] for name in ("$defs", "definitions") if name in root
            }
            value = json_value({**shared, **schema} if isinstance(schema, dict) else True)
            return f"{value} {_CLOSING}"
        if kinds not in (["string"], []):
            # What could be two things is read as the other one first, so only text is sure.
            return self._text(rule, {}, path)
        return self._text(rule, found if isinstance(found, dict) else {}, path)

    def _text(self, rule: str, schema: Mapping[str, Any], path: str) -> str:
        """Return the expression of a string that stands without quotes, and of its end."""
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(values, list) and values and all(isinstance(one, str) for one in values):
            return f"{choice(values)} {_CLOSING}"
        for keyword in ("format", "allOf", "anyOf", "oneOf"):
            if keyword in schema:
                raise UnsupportedParameter(
                    f'the schema keyword "{keyword}" at {path}.{keyword} cannot be enforced in the '
                    "XML in which this model writes its calls; leave it out",
                    param=f"{path}.{keyword}",
                )
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        terminals = ["/(?s:.*)/", _NO_CLOSING]
        if least or most != "":
            terminals.append(f"/(?s:.){{{least},{most}}}/")
        if "pattern" in schema:
            terminals.append(regex(_unanchored(str(schema["pattern"]))))
        # Lazy: the tag that follows would else be taken for more of the text.
        name = f"TEXT_{rule.upper()}"
        self._rule(name, " & ".join(terminals))
        self._rule(f"{rule}_text[lazy]", f"{name} {_CLOSING}")
        return f"{rule}_text"


def object_schema(schema: JsonObject) -> JsonObject:
    """Return a tool's schema so that it allows objects only, and no properties it does not name.

    Without a word about others a schema allows any; a forced call needs none that nobody reads.
    """
    closed = {"type": "object", **schema}
    if "properties" in closed and not {
        "patternProperties",
        "anyOf",
        "allOf",
        "oneOf",
        "$ref",
    } & set(closed):
        closed.setdefault("additionalProperties", False)
    return closed


def _properties(schema: JsonObject) -> Mapping[str, object]:
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


def _unanchored(pattern: str) -> str:
    """Return a regular expression that matches whole what `pattern` matches anywhere."""
    head = tail = "(?s:.*)"
    if "|" not in pattern:
        if pattern.startswith("^"):
            head, pattern = "", pattern[1:]
        if pattern.endswith("$") and not pattern.endswith("\\$"):
            tail, pattern = "", pattern[:-1]
    return f"{head}({pattern}){tail}"
