"""Read what a model's files say about its text: templates, special tokens, end tokens, defaults.

Pure functions over the parsed JSON files and the GGUF metadata; called by `TextModel.load`. A file
that is named must be readable JSON; a key that is absent or of another type is passed over, since
no two publishers write the same set.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from cortexd.errors import BadModelFile
from cortexd.models import ModelFiles
from engine.text.gguf_tokenizer import token_id

_MAX_JSON_BYTES: Final = 16 * 2**20
_MAX_TEMPLATE_BYTES: Final = 4 * 2**20
_GGUF_TEMPLATE: Final = "tokenizer.chat_template"
# GGUF key → name of the template variable.
_GGUF_SPECIAL_TOKENS: Final = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
    "seperator": "sep_token",  # the format's own spelling
}
# generation_config.json key → (name in a request, type).
_SAMPLING_KEYS: Final[dict[str, type[int] | type[float]]] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
}


def read_json(path: str | None) -> dict[str, Any]:
    """Return the object in a JSON file, {} when there is no such file.

    Raises: BadModelFile when it cannot be read or holds no object.
    """
    if path is None:
        return {}
    try:
        if (size := Path(path).stat().st_size) > _MAX_JSON_BYTES:
            raise BadModelFile(f"{path}: {size} bytes; at most {_MAX_JSON_BYTES} are accepted")
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise BadModelFile(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadModelFile(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadModelFile(f"{path}: must hold a JSON object")
    return content


def read_chat_templates(
    files: ModelFiles, tokenizer_config: Mapping[str, Any], metadata: Mapping[str, Any]
) -> dict[str, str]:
    """Return the model's templates by name, from the first place that has any.

    The order is chat_template.jinja, tokenizer_config.json, GGUF metadata.
    """
    if files.chat_template is not None:
        return {"default": _read_template_file(Path(files.chat_template))}
    configured = tokenizer_config.get("chat_template")
    if isinstance(configured, str):
        return {"default": configured}
    if isinstance(configured, list):
        return {
            entry["name"]: entry["template"]
            for entry in configured
            if isinstance(entry, dict)
            and isinstance(entry.get("name"), str)
            and isinstance(entry.get("template"), str)
        }
    templates: dict[str, str] = {}
    for key in metadata:  # not items(): that would decode the vocabulary
        if not key.startswith(_GGUF_TEMPLATE):
            continue
        value = metadata[key]
        if isinstance(value, str):
            templates[key[len(_GGUF_TEMPLATE) + 1 :] or "default"] = value
    return templates


def template_origin(files: ModelFiles, tokenizer_config: Mapping[str, Any]) -> str:
    """Return the place that `read_chat_templates` reads from, as errors name it."""
    if files.chat_template is not None:
        return files.chat_template
    if isinstance(tokenizer_config.get("chat_template"), str | list):
        return f"{files.tokenizer_config} chat_template"
    return f"{files.weights[0]} {_GGUF_TEMPLATE}"


def _read_template_file(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_TEMPLATE_BYTES:
            raise BadModelFile(f"{path}: larger than {_MAX_TEMPLATE_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadModelFile(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadModelFile(f"{path}: not UTF-8 text: {error}") from error


def read_special_tokens(
    tokenizer_config: Mapping[str, Any], metadata: Mapping[str, Any], tokenizer: Tokenizer
) -> dict[str, str]:
    """Return `bos_token`, `eos_token` and their like, as chat templates know them."""
    found: dict[str, str] = {}
    num_tokens = tokenizer.get_vocab_size(with_added_tokens=True)
    for key, name in _GGUF_SPECIAL_TOKENS.items():
        index = token_id(metadata, key, num_tokens)
        token = None if index is None else tokenizer.id_to_token(index)
        if token is not None:
            found[name] = token
    for name, value in tokenizer_config.items():
        if not name.endswith("_token"):
            continue
        token = value.get("content") if isinstance(value, dict) else value
        if isinstance(token, str):
            found[name] = token
    return found


def declared_end_tokens(
    configs: Iterable[Mapping[str, Any]],
    metadata: Mapping[str, Any],
    special_tokens: Mapping[str, str],
    tokenizer: Tokenizer,
) -> set[int]:
    """Return the ids that any of the model's files declares to end an output."""
    num_tokens = tokenizer.get_vocab_size(with_added_tokens=True)
    found: set[int] = set()
    for config in configs:
        for holder in (config, config.get("text_config")):
            if isinstance(holder, Mapping):
                found.update(_ids_in(holder.get("eos_token_id")))
    found.update(
        index
        for name in ("eos", "eot", "eom")
        if (index := token_id(metadata, name, num_tokens)) is not None
    )
    if "eos_token" in special_tokens:
        index = tokenizer.token_to_id(special_tokens["eos_token"])
        found.update(() if index is None else (index,))
    return found


def _ids_in(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if type(item) is int and item >= 0]


def read_sampling_defaults(generation_config: Mapping[str, Any]) -> dict[str, float | int]:
    """Return the sampling values that generation_config.json recommends, by request name.

    `do_sample: false` means greedy, whatever else is written beside it.
    """
    defaults: dict[str, float | int] = {}
    for key, number_type in _SAMPLING_KEYS.items():
        value = generation_config.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            defaults[key] = number_type(value)
    if generation_config.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return defaults
