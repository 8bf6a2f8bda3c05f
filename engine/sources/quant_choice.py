"""Which weight files of a model to take, from their names alone.

Pure; used for hub listings, local directories and wheels, so that a model resolves alike wherever
it lies. Without a quant, dense safetensors win over GGUF, and a single GGUF file is taken; with
several, the user must choose.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from cortexd.errors import InvalidValue, ModelSourceError

SHARD: Final = re.compile(r"-(\d{5})-of-(\d{5})$")
_QUANT_TAG: Final = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|TQ\d_\d|BF16|FP?16|FP?32|MXFP4\w*|NVFP4))(?=$|[-.])",
    re.IGNORECASE,
)
# Companions of a model that are GGUF files, too: vision projectors and quantisation statistics.
_COMPANION: Final = re.compile(r"(?:^|[-._/])(?:mmproj|imatrix)(?=$|[-._])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class GGUFChoice:
    """One quantisation of a model: its tag, and its files in shard order."""

    quant: str
    files: tuple[str, ...]


def list_ggufs(names: Iterable[str]) -> list[GGUFChoice]:
    """Return the models among GGUF file names, shards grouped, sorted by name."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.lower().endswith(".gguf") and not _COMPANION.search(name):
            groups.setdefault(SHARD.sub("", name[: -len(".gguf")]), []).append(name)
    return [GGUFChoice(_quant_tag(stem), tuple(files)) for stem, files in groups.items()]


def choose_gguf(names: Iterable[str], quant: str | None, model_id: str) -> GGUFChoice:
    """Return the GGUF model that `quant` names, or the only one when it is None.

    An exact tag wins over a part of the file name; case does not matter.
    Raises: InvalidValue listing what there is, with the nearest name; ModelSourceError for none.
    """
    choices = list_ggufs(names)
    if not choices:
        raise ModelSourceError(
            f'model "{model_id}" holds neither safetensors with a config.json nor a .gguf file'
        )
    tags = ", ".join(choice.quant for choice in choices)
    if not quant:
        if len(choices) == 1:
            return choices[0]
        raise InvalidValue(
            f'model "{model_id}" has several GGUF files; set quant to one of: {tags}',
            param="quant",
            available=[choice.quant for choice in choices],
        )
    wanted = quant.lower()
    matches = [choice for choice in choices if choice.quant.lower() == wanted]
    matches = matches or [choice for choice in choices if wanted in choice.files[0].lower()]
    if len(matches) == 1:
        return matches[0]
    raise _no_match(model_id, quant, matches, choices)


def _no_match(
    model_id: str, quant: str, matches: list[GGUFChoice], choices: list[GGUFChoice]
) -> InvalidValue:
    available = [choice.quant for choice in choices]
    if matches:
        named = ", ".join(choice.files[0] for choice in matches)
        text = f'quant "{quant}" of model "{model_id}" fits several files: {named}'
    else:
        lower = {tag.lower(): tag for tag in available}
        near = difflib.get_close_matches(quant.lower(), lower, n=1, cutoff=0)
        text = (
            f'model "{model_id}" has no quant "{quant}"; available: {", ".join(available)}; '
            f"nearest: {lower[near[0]]}"
        )
    return InvalidValue(text, param="quant", available=available)


def _quant_tag(stem: str) -> str:
    """Return the quantisation a file name ends in, or the whole name when it shows none."""
    base = stem.rsplit("/", 1)[-1]
    found = _QUANT_TAG.findall(base)
    return found[-1] if found else base
