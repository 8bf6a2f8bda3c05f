"""Tells fronts which models' text they will have to read, while the engine still loads the weights.

Part of the router; no state. Only a hint: a front that missed it reads the files at the first
request, which then waits for that (half a second for a vocabulary of 150,000 tokens).
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from cortexd.errors import ActorDown, MailboxFull
from cortexd.messages import ReadText
from cortexd.models import ModelFiles

if TYPE_CHECKING:
    from actors.router.router import Router

_FRONT_PREFIX: Final = "front."


def tell_fronts(router: Router, files: ModelFiles) -> None:
    """Tell all fronts of files that begin to load."""
    for peer in router.peers.all():
        _tell(router, peer.name, files)


def tell_front(router: Router, name: str) -> None:
    """Tell a front that has just come up of what is loaded and loading, if `name` is one."""
    for model in router.models.values():
        if model.files is not None and model.is_in("loading", "loaded", "recovering"):
            _tell(router, name, model.files)


def _tell(router: Router, name: str, files: ModelFiles) -> None:
    if name.startswith(_FRONT_PREFIX):
        with contextlib.suppress(ActorDown, MailboxFull):
            router.tell(name, ReadText(files))
