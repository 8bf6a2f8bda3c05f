"""The model catalogue, `models.toml`: what each model needs, where it may run, what it is called.

Read at start and by the reloader actor (and by `cortexd config check`). Rules here are pure:
priorities, feasibility inputs and aliases; live state is not known. A catalogue that cannot be read
is an error, never an empty catalogue: that would silently switch off pinning and aliases.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path as FilePath
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from cortexd.errors import ConfigError, WrongModality
from cortexd.model_id import absolute_model_id, check_model_id
from cortexd.models import ModelPolicy
from cortexd.paths import home_dir
from cortexd.problem import Locations, Problem, dotted, raise_problems
from cortexd.schema import read_struct
from cortexd.settings import Harness, NonNegativeFloat, NonNegativeInt, PositiveInt, Section
from cortexd.toml_file import read_toml
from cortexd.toml_lines import Path

DEFAULT_PRIORITY: Final = 100
# A model that somebody pinned is wanted there, so it outranks the default class.
PINNED_PRIORITY: Final = 1000

NonEmpty = Annotated[str, Meta(min_length=1)]
Price = Annotated[float, Meta(ge=0)]


class CatalogueLimit(Section, frozen=True):
    """Token limits; accepted for the reference's files, the engine derives the real ones."""

    context: PositiveInt | None = None
    input: PositiveInt | None = None
    output: PositiveInt | None = None


class Cost(Section, frozen=True):
    """US dollars per million tokens. Absent: not priced; 0: free on purpose."""

    input: Price
    output: Price
    cache_read: Price | None = None
    cache_write: Price | None = None


class RequestDefaults(Section, frozen=True):
    """What a request to the model that does not say otherwise asks for; ranges are the API's."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    max_tokens: PositiveInt | None = None


# One of these is what a model needs to answer a prompt.
_GENERATING: Final = frozenset({"text", "chat", "completion", "vision"})


class CatalogueModel(Section, frozen=True):
    """One `[[models]]` table."""

    id: str
    harness: Harness = "torch"
    quant: NonEmpty | None = None
    vram_mb: NonNegativeInt | None = None  # advisory footprint, MiB
    min_devices: PositiveInt = 1
    min_device_vram_mb: NonNegativeInt = 0  # each of `min_devices` devices has at least this, MiB
    pinned_on: list[NonEmpty] = []  # the neurons it may run on; empty: any
    residency_priority: NonNegativeInt | None = None
    source: Literal["hf", "hub"] | None = None  # the reference's key; the hub is the only registry
    limit: CatalogueLimit | None = None
    cost: Cost | None = None
    capabilities: list[NonEmpty] = []
    idle_ttl_s: NonNegativeFloat | None = None  # unloaded when unused so long; 0: never
    defaults: RequestDefaults | None = None

    @property
    def policy(self) -> ModelPolicy:
        """What the host that runs the model goes by."""
        defaults = {} if self.defaults is None else msgspec.structs.asdict(self.defaults)
        return ModelPolicy(
            residency_priority=self.priority,
            idle_ttl_s=self.idle_ttl_s,
            defaults={name: value for name, value in defaults.items() if value is not None},
        )

    @property
    def priority(self) -> int:
        """The residency class: it may displace models of its own class and below."""
        if self.residency_priority is not None:
            return self.residency_priority
        return PINNED_PRIORITY if self.pinned_on else DEFAULT_PRIORITY


class Catalogue(Section, frozen=True):
    """The whole of `models.toml`."""

    models: list[CatalogueModel] = []
    aliases: dict[str, str] = {}

    def model(self, model_id: str) -> CatalogueModel | None:
        """Return the entry of exactly this id."""
        return next((model for model in self.models if model.id == model_id), None)

    def resolve(self, name: str) -> str:
        """Return the model id that `name` means: an alias' target, or the name itself."""
        return self.aliases.get(name, name)

    def check_generates(self, name: str) -> None:
        """Raise WrongModality when what a model is declared for is no text, by chat or prompt.

        A model without declared capabilities is taken to answer.
        """
        entry = self.model(self.resolve(name))
        if entry is not None and entry.capabilities and not _GENERATING & set(entry.capabilities):
            raise WrongModality(
                f'model "{name}" answers no chats, completions or messages; its capabilities are: '
                f"{', '.join(entry.capabilities)}",
                param="model",
            )

    def priorities(self) -> dict[str, int]:
        """Return the residency class of every model; one not listed has DEFAULT_PRIORITY."""
        return {model.id: model.priority for model in self.models}


def load_catalogue(models_config: str | None) -> Catalogue:
    """Load the catalogue at `settings.models_config`; without one, an empty catalogue.

    Raises: ConfigError with one line for each thing that is wrong.
    """
    if models_config is None:
        return Catalogue()
    if not FilePath(models_config).exists():
        raise ConfigError(
            f"model catalogue {models_config}: does not exist; write it (as in "
            "conf/models.example.toml) or leave models_config out"
        )
    try:
        file = read_toml(FilePath(models_config))
    except ConfigError as error:
        raise ConfigError(f"model catalogue {error.message}") from error
    problems: list[Problem] = []
    catalogue = read_struct(file.document, Catalogue, problems)
    failed = {problem.path for problem in problems}
    problems += [found for found in _check(catalogue) if found.path not in failed]
    raise_problems(problems, Locations(file.name, file.lines, {}))
    return _with_absolute_paths(catalogue, FilePath(models_config).absolute().parent)


def _with_absolute_paths(catalogue: Catalogue, folder: FilePath) -> Catalogue:
    """Return the catalogue with local models named as the rest of the daemon names them."""
    home = home_dir()
    models = [
        msgspec.structs.replace(model, id=absolute_model_id(model.id, folder, home))
        for model in catalogue.models
    ]
    aliases = {
        alias: absolute_model_id(target, folder, home)
        for alias, target in catalogue.aliases.items()
    }
    return Catalogue(models=models, aliases=aliases)


def alias_warnings(catalogue: Catalogue, known_ids: Collection[str] = ()) -> list[str]:
    """Return a line for each alias whose target is neither in the catalogue nor in `known_ids`."""
    targets = {model.id for model in catalogue.models} | set(known_ids)
    return [
        f'alias "{alias}" means "{target}", which is no model here; requests for it fail until a '
        "neuron offers that model"
        for alias, target in catalogue.aliases.items()
        if target not in targets
    ]


def _check(catalogue: Catalogue) -> Iterator[Problem]:
    first_of: dict[str, int] = {}
    for i, model in enumerate(catalogue.models):
        path: Path = ("models", i, "id")
        try:
            check_model_id(model.id)
        except ConfigError as error:
            yield Problem(path, f"{dotted(path)}: {error}")
        first = first_of.setdefault(model.id, i)
        if first != i:
            yield Problem(path, f'{dotted(path)} = "{model.id}" is also that of models[{first}]')
        if len(set(model.pinned_on)) != len(model.pinned_on):
            path = ("models", i, "pinned_on")
            yield Problem(path, f"{dotted(path)} names a neuron twice")
    for alias, target in catalogue.aliases.items():
        yield from _check_alias(alias, target, catalogue)


def _check_alias(alias: str, target: str, catalogue: Catalogue) -> Iterator[Problem]:
    path: Path = ("aliases", alias)
    if not alias.strip():
        yield Problem(path, "aliases has an empty name; give it one")
    if target in catalogue.aliases:
        message = f'alias "{alias}" means the alias "{target}"; allowed: a model id'
        yield Problem(path, message)
    if catalogue.model(alias) is not None:
        yield Problem(path, f'alias "{alias}" is also the id of a model; rename the alias')
    try:
        check_model_id(target)
    except ConfigError as error:
        yield Problem(path, f'alias "{alias}": {error}')
