"""The models of this host by id: which are known, which were wanted last, and who may drop one.

Part of the router actor (same loop). What should run is written to the runtime folder at every
change, so that a restarted router brings it up again.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path
from typing import Final

from actors.router.managed_model import ManagedModel
from cortexd.catalogue import Catalogue, CatalogueModel
from cortexd.desired import DesiredModel, group_name, read_desired, write_desired
from cortexd.errors import ConfigError, ModelNotFound
from cortexd.models import LoadOptions, ModelPolicy, ModelState

_RUNNING: Final = ("loading", "loaded", "sleeping", "recovering")
AT_REST: Final = ("unloaded", "failed")


class LocalModels:
    """Find, add and forget the models of this host."""

    def __init__(self, runtime_dir: Path) -> None:
        self.by_id: dict[str, ManagedModel] = {}
        self.aliases: dict[str, str] = {}
        self.catalogue = Catalogue()
        self._runtime_dir = runtime_dir

    def find(self, name: str) -> ManagedModel:
        """Return the model of an id or alias. Raises: ModelNotFound with close names."""
        model = self.by_id.get(self.resolve(name))
        if model is None:
            raise self.not_found(name)
        return model

    def resolve(self, name: str) -> str:
        """Return the model id that a name means."""
        return self.aliases.get(name, name)

    def by_group(self, group: str) -> ManagedModel | None:
        """Return the model that an engine group runs."""
        return next((model for model in self.by_id.values() if model.group == group), None)

    def ids_in(self, *states: ModelState) -> list[str]:
        """Return the ids of the models in these states."""
        return [model_id for model_id, model in self.by_id.items() if model.is_in(*states)]

    def not_found(self, name: str) -> ModelNotFound:
        """Return the error for a name that means no model here."""
        here = (
            model_id
            for model_id, model in self.by_id.items()
            if model.is_known or not model.is_in(*AT_REST)
        )
        known = [*self.aliases, *here]
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {quoted(close)}?" if close else f"known models: {quoted(known)}"
        return ModelNotFound(
            f'model "{name}" is not known here; {hint} (load others with: cortexd load ID)',
            param="model",
        )

    # What there is

    def use_catalogue(
        self, catalogue: Catalogue, *, kept: Collection[str] = (), serves_here: bool = True
    ) -> None:
        """Know the models of a catalogue, and of an earlier one no longer what it alone had named.

        A model that runs goes on running as it was loaded. `kept` are ids that stay as they are.
        """
        self.catalogue = catalogue
        self.aliases = catalogue.aliases
        if not serves_here:
            return
        listed = {entry.id for entry in catalogue.models}
        for model_id, model in list(self.by_id.items()):
            if model_id not in listed and model_id not in kept:
                model.is_known = False
                model.listed_policy = ModelPolicy()
                self.forget(model)
        for entry in catalogue.models:
            known = self.by_id.get(entry.id)
            model = known or self.add(_options(entry), is_known=True)
            model.listed_policy = entry.policy
            if known is not None and entry.id not in kept:
                model.is_known = True
                if model.is_in(*AT_REST):
                    model.options = _options(entry)

    def completed(self, options: LoadOptions) -> LoadOptions:
        """Return options that say nothing but which model as those it runs or is listed with.

        How a model is served stands in one place: without its quant it might not even fit.
        """
        running, entry = self.by_id.get(options.model_id), self.catalogue.model(options.model_id)
        if not options.is_bare:
            return options
        if running is not None and not running.is_in(*AT_REST):
            return running.options
        return options if entry is None else _options(entry)

    def add(self, options: LoadOptions, *, is_known: bool) -> ManagedModel:
        """Add or update an entry that is not running. Raises: ConfigError."""
        check_devices(options)
        model = self.by_id.get(options.model_id)
        if model is None:
            model = ManagedModel(options, group_name(options.model_id), is_known)
            self.by_id[options.model_id] = model
        else:
            model.options = options
            model.is_known = model.is_known or is_known
        return model

    def forget(self, model: ManagedModel) -> None:
        """Drop a model that does not run and that only an explicit load had brought here."""
        if not model.is_known and model.is_in(*AT_REST):
            self.by_id.pop(model.options.model_id, None)
            model.wake()

    # What should run

    def remembered(self) -> list[DesiredModel] | None:
        """Return what should run by the state file, None when there is none."""
        return read_desired(self._runtime_dir)

    def remember(self, models: list[ManagedModel] | None = None) -> None:
        """Write what should run; without `models`, what runs now."""
        wanted = self._running() if models is None else models
        write_desired(
            self._runtime_dir,
            [DesiredModel(model.options, model.group, model.given_policy) for model in wanted],
        )

    def remember_with(self, model: ManagedModel) -> None:
        """Write the desired state before this model is loaded."""
        self.remember([*self._running(exclude=model), model])

    def remember_without(self, model: ManagedModel) -> None:
        """Write the desired state before this model is unloaded."""
        self.remember(self._running(exclude=model))

    def _running(self, exclude: ManagedModel | None = None) -> list[ManagedModel]:
        return [
            model
            for model in self.by_id.values()
            if model is not exclude and (model.is_due or model.is_in(*_RUNNING))
        ]


def check_devices(options: LoadOptions) -> None:
    """Raise ConfigError unless there is one device for each rank, or no choice at all."""
    devices = options.devices
    if devices is not None and not len(devices) == len(set(devices)) == options.tensor_parallel:
        raise ConfigError(
            f'model "{options.model_id}": devices {list(devices)} for tensor_parallel = '
            f"{options.tensor_parallel}; allowed: exactly one device of its own for each rank"
        )


def quoted(names: Collection[str]) -> str:
    """Return names as messages list them."""
    return ", ".join(f'"{name}"' for name in names) or "none"


def _options(entry: CatalogueModel) -> LoadOptions:
    return LoadOptions(
        model_id=entry.id,
        harness=entry.harness,
        quant=entry.quant,
        tensor_parallel=max(1, entry.min_devices),
    )
