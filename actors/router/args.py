"""What the router is started with; apart from it, so that the root need not import the router."""

from __future__ import annotations

import msgspec

from cortexd.catalogue import Catalogue
from cortexd.models import LoadOptions


class RouterArgs(msgspec.Struct, frozen=True):
    """What the daemon hands to its router."""

    default_models: list[LoadOptions]
    catalogue: Catalogue
