"""The union that every mailbox decodes: a message that is not in it can be read by nobody."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import UnionType
from typing import get_args

from cortexd import messages
from cortexd.messages.control import Message


def _leaves(base: type[Message]) -> Iterator[type[Message]]:
    for kind in base.__subclasses__():
        if kind.__module__.startswith(messages.__name__):
            yield from _leaves(kind)
            if kind.__struct_config__.tag is not None and not kind.__subclasses__():
                yield kind


def _members(union: object) -> Iterator[object]:
    for member in get_args(union):
        yield from _members(member) if isinstance(member, UnionType) else (member,)


def test_every_message_can_be_decoded_by_whoever_gets_it() -> None:
    """Sleep and wake once were not: their leader answered "unknown kind"."""
    for module in pkgutil.iter_modules(messages.__path__):
        importlib.import_module(f"{messages.__name__}.{module.name}")
    readable = set(_members(messages.Body))
    unreadable = [kind.__name__ for kind in _leaves(Message) if kind not in readable]
    assert unreadable == []
