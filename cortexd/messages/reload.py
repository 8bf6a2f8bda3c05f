"""Files that are read again while the daemon runs: asked for, and what they hold now."""

from __future__ import annotations

from cortexd.catalogue import Catalogue
from cortexd.messages.control import Message


class ReloadFiles(Message, frozen=True, tag="ReloadFiles"):
    """Root → reloader (SIGHUP): look at all files now, changed or not."""


class CatalogueChanged(Message, frozen=True, tag="CatalogueChanged"):
    """Reloader → router: the catalogue in force; may be the one they have."""

    catalogue: Catalogue
