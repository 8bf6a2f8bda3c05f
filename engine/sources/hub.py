"""Models of the Hugging Face Hub, through its own client, cache and token variables.

Online the repository is listed first and only the files a load needs are fetched, at the commit of
that listing. When the hub cannot be reached, or offline mode is set, the local snapshot is used.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cortexd.errors import CortexError, ModelSourceError, RegistryUnreachable
from cortexd.models import ModelFiles
from cortexd.settings import Store
from engine.sources.checkpoint_files import (
    COMPANIONS,
    INDEX_NAME,
    collect_directory,
    safetensors_names,
    takes_safetensors,
)
from engine.sources.disk import disk_full_as_error, insufficient_disk, require_free
from engine.sources.hub_cache import HubCache
from engine.sources.hub_progress import progress_bar_class
from engine.sources.model_id import HubId
from engine.sources.quant_choice import choose_gguf
from engine.sources.transfer import Transfer

_SETTING = "store.hub_cache_dir"


class _Unreachable(Exception):
    """The hub did not answer; the cause is the client's exception."""


@dataclass(frozen=True, slots=True)
class _Listing:
    """A repository at one commit: its file names and sizes."""

    commit: str
    sizes: dict[str, int]


def resolve_hub(
    hub_id: HubId, quant: str | None, *, store: Store, transfer: Transfer
) -> ModelFiles:
    """Return a model of the hub, fetched as far as it is not in the client's cache.

    Raises: ModelSourceError, RegistryUnreachable, InsufficientDisk, InvalidValue, BadModelFile,
    Cancelled, DeadlineExceeded.
    """
    from huggingface_hub import constants

    cache = HubCache(Path(store.hub_cache_dir or constants.HF_HUB_CACHE).expanduser().absolute())
    if store.offline or constants.HF_HUB_OFFLINE:
        return _resolve_cached(hub_id, quant, cache, transfer.model_id, "offline mode is set")
    try:
        with _client_errors(hub_id, cache):
            listing = _list_repository(hub_id)
            return _download(hub_id, quant, listing, cache, transfer)
    except _Unreachable as error:
        cause = f"the hub cannot be reached ({error})"
        try:
            return _resolve_cached(hub_id, quant, cache, transfer.model_id, cause)
        except ModelSourceError as failure:
            raise RegistryUnreachable(failure.message) from error


def _list_repository(hub_id: HubId) -> _Listing:
    from huggingface_hub import HfApi

    info = HfApi().model_info(
        hub_id.repo_id, revision=hub_id.revision, files_metadata=True, timeout=20
    )
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    return _Listing(info.sha or hub_id.revision or "main", sizes)


def _download(
    hub_id: HubId, quant: str | None, listing: _Listing, cache: HubCache, transfer: Transfer
) -> ModelFiles:
    fetch = _Fetch(hub_id, listing, cache, transfer)
    names = {name for name in listing.sizes if "/" not in name}
    if takes_safetensors(names, quant, transfer.model_id):
        index = fetch.fetch(INDEX_NAME) if INDEX_NAME in names else None
        weights = safetensors_names(names, index, transfer.model_id)
        missing = sorted(set(weights) - names)
        if missing:
            raise ModelSourceError(
                f'model "{transfer.model_id}": the repository lacks {missing[0]}, which its '
                "index names"
            )
    else:
        # Repositories with many quantisations keep the large ones in folders.
        ggufs = [name for name in listing.sizes if name.count("/") <= 1]
        weights = list(choose_gguf(ggufs, quant, transfer.model_id).files)
    companions = [name for name in COMPANIONS.values() if name in names]
    directory = fetch.fetch_all(companions + weights)
    return collect_directory(
        directory,
        quant,
        model_id=transfer.model_id,
        source="hub",
        revision=listing.commit,
    )


class _Fetch:
    """The downloads of one resolve: counts bytes over all its files."""

    def __init__(
        self, hub_id: HubId, listing: _Listing, cache: HubCache, transfer: Transfer
    ) -> None:
        self._repo_id = hub_id.repo_id
        self._listing = listing
        self._cache = cache
        self._transfer = transfer

    def fetch(self, name: str) -> Path:
        """Return the local path of one file, downloaded when it is not cached."""
        return self.fetch_all([name]) / name

    def fetch_all(self, names: list[str]) -> Path:
        """Download what is not cached; return the snapshot directory."""
        snapshot = self._cache.snapshot_directory(self._repo_id, self._listing.commit)
        absent = [name for name in names if not (snapshot / name).is_file()]
        total = sum(self._listing.sizes[name] for name in absent)
        require_free(self._cache.root, total, _SETTING)
        done = 0
        with disk_full_as_error(self._cache.root, total, _SETTING):
            for name in absent:
                self._transfer.report("downloading", done, total)
                self._fetch_one(name, done, total)
                done += self._listing.sizes[name]
        self._transfer.report("downloading", done, total)
        return snapshot

    def _fetch_one(self, name: str, done: int, total: int) -> None:
        from huggingface_hub import hf_hub_download

        hf_hub_download(
            self._repo_id,
            name,
            revision=self._listing.commit,
            cache_dir=self._cache.root,
            tqdm_class=progress_bar_class(self._transfer, done, total),
        )


def _resolve_cached(
    hub_id: HubId, quant: str | None, cache: HubCache, model_id: str, cause: str
) -> ModelFiles:
    commit = cache.find_commit(hub_id.repo_id, hub_id.revision)
    if commit is not None:
        try:
            return collect_directory(
                cache.snapshot_directory(hub_id.repo_id, commit),
                quant,
                model_id=model_id,
                source="hub",
                revision=commit,
            )
        except ModelSourceError as error:
            cause = f"{cause}, and its local snapshot cannot be used: {error.message}"
    else:
        cached = ", ".join(cache.list_repositories()[:20]) or "nothing"
        cause = f"{cause}, and it is not in {cache.root}, which holds: {cached}"
    raise ModelSourceError(
        f'model "{model_id}" cannot be fetched: {cause}; go online once (unset HF_HUB_OFFLINE '
        "and store.offline) or give a local path"
    )


@contextmanager
def _client_errors(hub_id: HubId, cache: HubCache) -> Iterator[None]:
    """Map what the hub's client raises to our errors."""
    from huggingface_hub import errors

    name = hub_id.repo_id
    try:
        yield
    except CortexError:
        raise
    except errors.GatedRepoError as error:
        raise ModelSourceError(
            f'model "{name}" is gated: accept its terms on the hub and set HF_TOKEN'
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelSourceError(
            f'model "{name}" is not on the hub, or is private: check the name, or set HF_TOKEN'
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelSourceError(f'model "{name}" has no revision "{hub_id.revision}"') from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status is None or status == 429 or status >= 500:
            raise _Unreachable(_first_line(error)) from error
        raise ModelSourceError(f'model "{name}": the hub refused: {_first_line(error)}') from error
    except errors.LocalEntryNotFoundError as error:  # a download whose connection failed
        raise _Unreachable(_first_line(error)) from error
    except Exception as error:
        raise _map_other(error, name, cache) from error


def _map_other(error: Exception, name: str, cache: HubCache) -> Exception:
    """Map errors of the layers below the client: HTTP transport, disk, checksum."""
    text = _first_line(error)
    if "No space left on device" in text:
        return insufficient_disk(cache.root, 0, _SETTING)
    if _is_network_error(error):
        return _Unreachable(text)
    return ModelSourceError(f'model "{name}" cannot be fetched: {text}')


def _is_network_error(error: BaseException | None) -> bool:
    while error is not None:
        # The transport's package has changed with the client's releases: httpx, httpx2.
        if type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            return True
        if isinstance(error, ConnectionError | TimeoutError | socket.gaierror):
            return True
        error = error.__cause__
    return False


def _first_line(error: Any) -> str:
    return f"{type(error).__name__}: {error}".strip().split("\n", 1)[0][:300]
