"""Decodes request bodies into typed structs, with errors a client can act on.

Every error names the field as a dotted path, its value and what is allowed; the allowed ranges are
read from the struct's own types, so they cannot drift from what is checked.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from cortexd.errors import (
    CortexError,
    InvalidJson,
    InvalidType,
    InvalidValue,
    MissingParameter,
)

StructT = TypeVar("StructT", bound=msgspec.Struct)

_MAX_SHOWN = 80
_AT_PATH = re.compile(r"^(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$(?P<path>.*)`)?$", re.DOTALL)
_MISSING_FIELD = re.compile(r"missing required field `(?P<field>\w+)`")


def decode_body(body: bytes, struct: type[StructT]) -> StructT:
    """Return the body as `struct`. Raises: InvalidJson, InvalidType, InvalidValue."""
    try:
        decoded = _decoder(struct).decode(body)
    except msgspec.ValidationError as error:
        raise _explain(str(error), body, struct) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidJson(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise InvalidJson("the body is not usable JSON: it is nested too deeply") from None
    assert isinstance(decoded, struct), "a decoder returns its type"
    return decoded


def decode_raw(raw: msgspec.Raw) -> object:
    """Return a field that was kept raw as plain Python values. Raises: InvalidJson."""
    try:
        value: object = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidJson(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise InvalidJson("the body is not usable JSON: it is nested too deeply") from None
    return value


@lru_cache
def _decoder(struct: type[msgspec.Struct]) -> msgspec.json.Decoder[msgspec.Struct]:
    return msgspec.json.Decoder(struct)


def _explain(message: str, body: bytes, struct: type[msgspec.Struct]) -> CortexError:
    match = _AT_PATH.match(message)
    assert match is not None, "the pattern matches any text"
    what, path = match["what"], (match["path"] or "").lstrip(".")
    missing = _MISSING_FIELD.search(what)
    if missing:
        param = f"{path}.{missing['field']}".lstrip(".")
        return MissingParameter(f"{param} is missing", param=param)
    if not path:
        return InvalidType(f"the body must be a JSON object: {_lower(what)}")
    path = path.replace("[...]", ".*")
    if match["key"]:
        path += ".*"
    top = re.split(r"[.\[]", path, maxsplit=1)[0]
    text = f"{path} is not usable: {_lower(what)}" if path != top else f"{top} is not usable"
    value = _value_of(body, top)
    if path == top and value is not None:
        text = f"{top} is {value}"
    allowed = _allowed_of(struct, top)
    if allowed:
        text += f"; allowed: {allowed}" if path == top else f"; {top} may be {allowed}"
    error_class = InvalidType if ", got `" in what else InvalidValue
    return error_class(text, param=path)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _value_of(body: bytes, field: str) -> str | None:
    """Return the field's value as the client wrote it, shortened."""
    try:
        raw = msgspec.json.decode(body, type=dict[str, msgspec.Raw]).get(field)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None  # broken further on; the first error is reported without the value
    if raw is None:
        return None
    text = bytes(raw)[: 4 * _MAX_SHOWN].decode("utf-8", "replace")
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"


@lru_cache
def _allowed_of(struct: type[msgspec.Struct], field: str) -> str:
    """Return what the field's type allows, in words; empty for free-form fields."""
    info = inspect.type_info(struct)
    assert isinstance(info, inspect.StructType), "decode_body takes structs"
    for candidate in info.fields:
        if candidate.encode_name == field:
            return _describe(candidate.type)
    return ""


def _describe(kind: inspect.Type) -> str:
    if isinstance(kind, inspect.UnionType):
        parts = [_describe(part) for part in kind.types if not isinstance(part, inspect.NoneType)]
        return " or ".join(part for part in parts if part)
    if isinstance(kind, inspect.IntType):
        return _describe_number("an integer", kind)
    if isinstance(kind, inspect.FloatType):
        return _describe_number("a number", kind)
    if isinstance(kind, inspect.StrType):
        return "a string" if not kind.min_length else "a string that is not empty"
    if isinstance(kind, inspect.BoolType):
        return "true or false"
    if isinstance(kind, inspect.ListType):
        return _describe_list(kind)
    if isinstance(kind, inspect.DictType | inspect.StructType):
        return "an object"
    return ""


def _describe_number(name: str, kind: inspect.IntType | inspect.FloatType) -> str:
    low: Any = kind.ge if kind.ge is not None else kind.gt
    high: Any = kind.le if kind.le is not None else kind.lt
    if low is None or high is None:
        return name
    above = "above " if kind.gt is not None else ""
    return f"{name} from {above}{low} to {high}"


def _describe_list(kind: inspect.ListType) -> str:
    item = _describe(kind.item_type)
    most = f" of at most {kind.max_length}" if kind.max_length is not None else ""
    return f"a list{most}" + (f" (each {item})" if item else "")
