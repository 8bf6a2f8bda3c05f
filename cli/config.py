"""`cortexd config check|show`: what the configuration says, or all that is wrong with it."""

from __future__ import annotations

import argparse

import msgspec

from cli.control import settings_of
from cli.exit_code import OK
from cli.format import complain
from cortexd.catalogue import alias_warnings, load_catalogue
from cortexd.config import LoadedSettings
from cortexd.keys import check_secrets


def config(args: argparse.Namespace) -> int:
    """Check the configuration, or print the settings in force as TOML. Raises: ConfigError."""
    loaded = settings_of(args)
    if args.action == "show":
        print(_as_toml(loaded), end="")
        return OK
    for warning in (*loaded.warnings, *catalogue_warnings(loaded)):
        complain(f"warning: {warning}")
    check_secrets(loaded.settings)
    files = [str(loaded.source)] if loaded.source else []
    if loaded.settings.models_config:
        files.append(loaded.settings.models_config)
    print(f"ok: {', '.join(files) or 'no file, all defaults'}")
    return OK


def catalogue_warnings(loaded: LoadedSettings) -> list[str]:
    """Load the catalogue and return what is worth a warning. Raises: ConfigError."""
    catalogue = load_catalogue(loaded.settings.models_config)
    return alias_warnings(catalogue, {model.model_id for model in loaded.settings.default_models})


def _as_toml(loaded: LoadedSettings) -> str:
    import tomli_w

    document = _without_none(msgspec.to_builtins(loaded.settings))
    assert isinstance(document, dict), "settings are a table"
    source = loaded.source or "no file; defaults and environment"
    return f"# settings in force; read from: {source}\n{tomli_w.dumps(document)}"


def _without_none(value: object) -> object:
    """Drop absent options: TOML has no null."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value
