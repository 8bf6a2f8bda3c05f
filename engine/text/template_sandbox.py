"""The Jinja environment in which a model's chat template runs: what Hugging Face offers, bounded.

A template comes with the model, so it is foreign code. On top of Jinja's immutable sandbox each
render has a deadline, checked in every loop pass and call, and no operator, filter or string method
may build a value of more than `MAX_VALUE_LENGTH` elements. Not bounded: the sum of many values just
below that limit, and the time of a single built-in operation; both end at the deadline.
Source: transformers 5.23 `utils/chat_template_utils.py` for the names a template may use.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from datetime import datetime
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from engine.text.render_time import SlowTemplateError, quick_budget_s
from engine.text.template_bounds import (
    BOUNDED_FILTERS,
    TemplateTooCostly,
    bounded_concat,
    check_format_fields,
    check_operands,
    check_string_method,
)

# A hundred times what the longest conversations take.
MAX_RENDER_S: Final = 5.0

_deadline: ContextVar[float] = ContextVar("template_deadline")


def start_deadline() -> None:
    """Give the render that follows here `MAX_RENDER_S` seconds of this thread, a quick one less."""
    budget_s = quick_budget_s()
    _deadline.set(time.thread_time() + (MAX_RENDER_S if budget_s is None else budget_s))


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox; one per compiled template, shared by its renders."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(bounded_concat)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, loopcontrols],
            # Folding constants would run a hostile expression while compiling.
            optimized=False,
        )
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            dict=_TemplateDict(),
            namespace=_TemplateNamespace,
        )
        del self.globals["lipsum"]
        self.filters.update(BOUNDED_FILTERS)

    def compile_template(self, source: str) -> jinja2.Template:
        """Return the template with a deadline check in every loop.

        Raises: jinja2.TemplateSyntaxError, RecursionError for absurd nesting.
        """
        tree = self.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            loop.body.insert(0, nodes.ExprStmt(_environment_call("check_deadline", [])))
        _replace_concat_nodes(tree)
        tree.set_environment(self)
        for node in tree.find_all(nodes.Node):
            if not node.lineno:
                node.lineno = 1
        code = self.compile(tree)
        return jinja2.Template.from_code(self, code, self.make_globals(None))

    def check_deadline(self) -> None:
        """Raise `TemplateTooCostly` when the render has run for too long, or SlowTemplateError."""
        if time.thread_time() > _deadline.get():
            if quick_budget_s() is not None:
                raise SlowTemplateError
            raise TemplateTooCostly(f"the template ran for more than {MAX_RENDER_S:g} s")

    def join_values(self, *values: Any) -> str:
        """Join the operands of `~`."""
        return bounded_concat([str(value) for value in values])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator after a look at how large its result would be."""
        check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(
        __self,
        __context: Context,
        __obj: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Call from template code: the deadline is checked, and string methods are bounded."""
        __self.check_deadline()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            args = check_string_method(owner, __obj.__name__, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return the sandboxed `str.format`, refusing field widths that could fill memory."""
        if isinstance(owner := getattr(value, "__self__", None), str) and value.__name__ in (
            "format",
            "format_map",
        ):
            check_format_fields(owner)
        return super().wrap_str_format(value)


def _environment_call(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


def _replace_concat_nodes(node: nodes.Node) -> None:
    """Replace each `a ~ b` by a bounded call, since Jinja does not let one intercept it."""
    for field, value in node.iter_fields():
        if isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, nodes.Node):
                    _replace_concat_nodes(item)
                    value[index] = _without_concat(item)
        elif isinstance(value, nodes.Node):
            _replace_concat_nodes(value)
            setattr(node, field, _without_concat(value))


def _without_concat(node: nodes.Node) -> nodes.Node:
    if isinstance(node, nodes.Concat):
        return _environment_call("join_values", node.nodes).set_lineno(node.lineno)
    return node


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


class _TemplateDict:
    """`dict` for templates: callable, with no class attributes behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(Namespace):
    """`namespace` for templates: no name may begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute_name(name)
        super().__setitem__(name, value)


def _check_attribute_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace attribute may not begin with an underscore: {name!r}")


class _GenerationTag(Extension):
    """`{% generation %}` marks what to train on; for inference its body is all that counts."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Return the body in a scope of its own, as Hugging Face's call block has."""
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(lineno)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()
