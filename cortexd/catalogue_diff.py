"""What differs between two catalogues, one line for each key. Pure; shown at a reload."""

from __future__ import annotations

import msgspec

from cortexd.catalogue import Catalogue, CatalogueModel


def catalogue_changes(old: Catalogue, new: Catalogue) -> list[str]:
    """Return what a person reads at a reload: models and aliases added, removed, changed."""
    before = {model.id: model for model in old.models}
    after = {model.id: model for model in new.models}
    lines = [f'+ model "{model_id}"' for model_id in after if model_id not in before]
    lines += [f'- model "{model_id}"' for model_id in before if model_id not in after]
    for model_id, model in after.items():
        if model_id in before:
            lines += _model_changes(before[model_id], model)
    for alias in sorted(old.aliases.keys() | new.aliases.keys()):
        target, wanted = old.aliases.get(alias), new.aliases.get(alias)
        if target is None:
            lines.append(f'+ alias "{alias}" = "{wanted}"')
        elif wanted is None:
            lines.append(f'- alias "{alias}" = "{target}"')
        elif target != wanted:
            lines.append(f'~ alias "{alias}": "{target}" -> "{wanted}"')
    return lines


def _model_changes(old: CatalogueModel, new: CatalogueModel) -> list[str]:
    before, after = msgspec.to_builtins(old), msgspec.to_builtins(new)
    return [
        f'~ model "{new.id}" {key}: {_text(before[key])} -> {_text(after[key])}'
        for key in before
        if before[key] != after[key]
    ]


def _text(value: object) -> str:
    return "unset" if value is None else msgspec.json.encode(value).decode()
