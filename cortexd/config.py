"""Load the daemon's Settings: command line over environment over file over defaults.

Called once by the command; every process then receives the same frozen value. Whatever is wrong
ends in one ConfigError that tells all of it, file, line and key each, and nothing starts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Final

import msgspec

from cortexd.config_env import Override, environment_overrides
from cortexd.config_rules import check_rules, warnings
from cortexd.errors import ConfigError
from cortexd.model_id import absolute_model_id
from cortexd.paths import config_home, home_dir
from cortexd.problem import Locations, Problem, raise_problems
from cortexd.schema import read_struct
from cortexd.settings import Settings
from cortexd.toml_file import TomlFile, read_toml
from cortexd.toml_lines import Path

FILE_NAME: Final = "cortex.toml"
CATALOGUE_NAME: Final = "models.toml"


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """The settings, the file they came from (None: no file), and what is worth a warning."""

    settings: Settings
    source: FilePath | None
    warnings: tuple[str, ...] = ()


def load_settings(
    path: str | None,
    environ: Mapping[str, str],
    cwd: FilePath,
    overrides: Sequence[Override] = (),
) -> LoadedSettings:
    """Load the settings of this host.

    `path` is the user's `--config`; without it the usual places are searched. `overrides` are
    command-line options; they win over the environment, which wins over the file. Paths in the
    result are absolute: those of the file are relative to its folder, the others to `cwd`.

    Raises: ConfigError with one line for each thing that is wrong.
    """
    source = find_config(path, environ, cwd)
    file = TomlFile("configuration", {}, {}) if source is None else read_toml(source)
    problems: list[Problem] = []
    origins: dict[Path, str] = {}
    document = dict(file.document)
    for override in [*environment_overrides(environ, problems, origins), *overrides]:
        origins[override.path] = override.origin
        _set(document, override)
    settings = read_struct(document, Settings, problems)
    failed = {problem.path for problem in problems}
    for problem in check_rules(settings):
        if not _touches((problem.path, *problem.involves), failed):
            problems.append(problem)
    raise_problems(problems, Locations(file.name, file.lines, origins))
    settings = _with_absolute_paths(settings, source, cwd, origins, environ)
    return LoadedSettings(settings, source, tuple(warnings(settings)))


def find_config(path: str | None, environ: Mapping[str, str], cwd: FilePath) -> FilePath | None:
    """Return the absolute path of the file to read, or None when there is none.

    Raises: ConfigError when `--config` or `$CORTEXD_CONFIG` names a file that does not exist.
    """
    named = {"--config": path, "$CORTEXD_CONFIG": environ.get("CORTEXD_CONFIG")}
    for origin, name in named.items():
        if name:
            file = _absolute(name, cwd, environ)
            if not file.is_file():
                raise ConfigError(f"{origin} names {file}, which is not a file")
            return file
    return next((file for file in config_places(environ, cwd) if file.is_file()), None)


def config_places(environ: Mapping[str, str], cwd: FilePath) -> tuple[FilePath, ...]:
    """Return where a configuration file is looked for when none is named, in order."""
    return (
        cwd / FILE_NAME,
        config_home(environ) / FILE_NAME,
        FilePath("/etc/cortex") / FILE_NAME,
    )


def _set(document: dict[str, object], override: Override) -> None:
    """Put an override's value into the document, without changing tables shared with the file."""
    table = document
    for part in override.path[:-1]:
        inner = table.get(str(part))
        if inner is not None and not isinstance(inner, dict):
            return  # the file's own fault is reported; it must not be hidden by the override
        table[str(part)] = table = dict(inner or {})
    key = str(override.path[-1])
    if override.value is None:
        table.pop(key, None)
    else:
        table[key] = override.value


def _touches(paths: tuple[Path, ...], failed: set[Path]) -> bool:
    """Return whether a failed key is one of these, or above or below one of them."""
    return any(
        path[: len(bad)] == bad or bad[: len(path)] == path for path in paths for bad in failed
    )


def _with_absolute_paths(
    settings: Settings,
    source: FilePath | None,
    cwd: FilePath,
    origins: Mapping[Path, str],
    environ: Mapping[str, str],
) -> Settings:
    base = cwd if source is None else source.parent

    def absolute(value: str | None, *path: str) -> str | None:
        if value is None:
            return None
        return str(_absolute(value, cwd if path in origins else base, environ))

    store, paths = settings.store, settings.paths
    models_base = cwd if ("default_models",) in origins else base
    models_config = absolute(settings.models_config, "models_config")
    if models_config is None and source is not None and (base / CATALOGUE_NAME).is_file():
        models_config = str(base / CATALOGUE_NAME)
    return msgspec.structs.replace(
        settings,
        models_config=models_config,
        entitlements=msgspec.structs.replace(
            settings.entitlements,
            keys_file=absolute(settings.entitlements.keys_file, "entitlements", "keys_file"),
        ),
        neurons=[
            msgspec.structs.replace(entry, key_file=absolute(entry.key_file, "neurons"))
            for entry in settings.neurons
        ],
        default_models=[
            msgspec.structs.replace(
                model, model_id=absolute_model_id(model.model_id, models_base, home_dir(environ))
            )
            for model in settings.default_models
        ],
        store=msgspec.structs.replace(
            store,
            cache_dir=absolute(store.cache_dir, "store", "cache_dir"),
            hub_cache_dir=absolute(store.hub_cache_dir, "store", "hub_cache_dir"),
        ),
        paths=msgspec.structs.replace(
            paths,
            runtime_dir=absolute(paths.runtime_dir, "paths", "runtime_dir"),
            state_dir=absolute(paths.state_dir, "paths", "state_dir"),
        ),
    )


def _absolute(text: str, base: FilePath, environ: Mapping[str, str]) -> FilePath:
    if text == "~" or text.startswith("~/"):
        return home_dir(environ) / text[2:]
    return FilePath(os.path.normpath(base / text))
