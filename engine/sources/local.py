"""Models that lie on this machine: a .gguf file, or a directory.

Nothing is copied and nothing is written.
"""

from __future__ import annotations

import os
from pathlib import Path

from cortexd.errors import BadModelFile, InvalidValue, ModelSourceError
from cortexd.models import ModelFiles
from engine.sources.checkpoint_files import collect_directory, model_files
from engine.sources.quant_choice import SHARD, choose_gguf, list_ggufs


def resolve_path(path: Path, quant: str | None, model_id: str) -> ModelFiles:
    """Return the model at `path`.

    Raises: ModelSourceError when there is nothing to load, InvalidValue when it is not clear what.
    """
    try:
        if path.is_dir():
            return collect_directory(
                path.resolve(), quant, model_id=model_id, source="path", revision="local"
            )
        if not path.is_file():
            raise BadModelFile(f'model "{model_id}": {path} does not exist')
        if not os.access(path, os.R_OK):
            raise BadModelFile(f'model "{model_id}": {path} may not be read by this user')
    except OSError as error:
        raise ModelSourceError(f'model "{model_id}": {path}: {error.strerror}') from error
    return _resolve_file(path.resolve(), quant, model_id)


def _resolve_file(path: Path, quant: str | None, model_id: str) -> ModelFiles:
    if path.suffix.lower() != ".gguf":
        raise InvalidValue(
            f'model "{model_id}": {path.name} is not a .gguf file; for safetensors give the '
            "directory that holds them and config.json",
            param="model_id",
        )
    choice = choose_gguf(_parts(path), quant, model_id)
    return model_files(
        path.parent,
        set(),
        list(choice.files),
        quant=choice.quant,
        file_format="gguf",
        model_id=model_id,
        source="path",
        revision="local",
    )


def _parts(path: Path) -> list[str]:
    """Return the names of all parts of the split model that `path` is of, or just its own."""
    if not SHARD.search(path.stem):
        return [path.name]
    names = [entry.name for entry in os.scandir(path.parent) if entry.is_file()]
    groups = [choice.files for choice in list_ggufs(names) if path.name in choice.files]
    return list(groups[0]) if groups else [path.name]
