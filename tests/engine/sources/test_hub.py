"""The hub through its real client: what is fetched, what happens without a network."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from cortexd.errors import Cancelled, CortexError, InsufficientDisk, InvalidValue, ModelSourceError
from cortexd.models import ModelFiles
from cortexd.settings import Store
from engine.sources import resolve
from tests.engine.sources.hub_server import COMMIT, Hub, serve_hub

SHARDS = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
DENSE = {
    "config.json": b"{1}",  # the client stores files of equal content once
    "tokenizer.json": b"{2}",
    "generation_config.json": b"{3}",
    "README.md": b"long text",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    ).encode(),
    SHARDS[0]: b"1" * 1000,
    SHARDS[1]: b"2" * 2000,
    "consolidated.safetensors": b"3" * 5000,
    "original/params.json": b"{}",
}
GGUF = {"m-Q4_0.gguf": b"4" * 100, "m-Q8_0.gguf": b"8" * 200, "BF16/m-BF16.gguf": b"b" * 300}


class Client:
    """Resolves `org/model` through the real client, into a cache of its own."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.cancel = threading.Event()
        self.reports: list[tuple[str, int, int]] = []
        self.cancel_at: int | None = None

    def resolve(
        self, model_id: str = "org/model", quant: str | None = None, offline: bool = False
    ) -> ModelFiles:
        store = Store(hub_cache_dir=str(self.cache), offline=offline)
        return resolve(model_id, quant, store, self.cache / "x", self._progress, self.cancel)

    def _progress(self, stage: str, done: int, total: int) -> None:
        self.reports.append((stage, done, total))
        if self.cancel_at is not None and done >= self.cancel_at:
            self.cancel.set()


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path / "hub")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serve_hub(dict(DENSE)) as server:
        _use_endpoint(server.endpoint, monkeypatch)
        yield server


def _use_endpoint(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub({}) as server:
        endpoint = server.endpoint
    _use_endpoint(endpoint, monkeypatch)  # nobody listens there any more


def _write_snapshot(cache: Path, files: dict[str, bytes]) -> Path:
    """Write what the client would have left after a download."""
    repository = cache / "models--org--model"
    snapshot = repository / "snapshots" / COMMIT
    for name, data in files.items():
        path = snapshot / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_resolve_fetches_only_what_a_load_needs(client: Client, hub: Hub) -> None:
    """Index, shards and companions come, the rest of the repository does not."""
    files = client.resolve()
    assert (files.source, files.revision, files.format) == ("hub", COMMIT, "safetensors")
    assert [Path(path).name for path in files.weights] == SHARDS
    assert Path(files.weights[1]).read_bytes() == DENSE[SHARDS[1]]
    assert files.size_bytes == 3000
    assert files.config is not None
    assert files.tokenizer is not None
    assert sorted(hub.downloads) == sorted(
        set(DENSE) - {"README.md", "consolidated.safetensors", "original/params.json"}
    )
    done = [done for stage, done, total in client.reports if total == 3009]
    assert done == sorted(done)
    assert done[-1] == 3009


def test_resolve_again_downloads_nothing(client: Client, hub: Hub) -> None:
    """What is in the client's cache is used; only the listing is asked for."""
    first = client.resolve()
    hub.requests.clear()
    assert client.resolve() == first
    assert [request.split()[0] for request in hub.requests] == ["GET"]
    assert hub.downloads == []


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_resolve_offline_by_any_revision(client: Client, revision: str) -> None:
    """A branch is looked up in the cache's refs, a commit is taken as it is."""
    _write_snapshot(client.cache, GGUF)
    files = client.resolve("org/model" + revision, quant="BF16", offline=True)
    assert files.revision == COMMIT
    assert files.weights[0].endswith("/BF16/m-BF16.gguf")
    with pytest.raises(ModelSourceError, match="is not in"):
        client.resolve("org/model@other", offline=True)


def test_resolve_gguf_by_quant(client: Client, hub: Hub) -> None:
    """Only the chosen quantisation is fetched, from a folder as well."""
    hub.files = dict(GGUF)
    with pytest.raises(InvalidValue, match="set quant to one of: BF16, Q4_0, Q8_0"):
        client.resolve()
    with pytest.raises(InvalidValue, match="nearest: Q4_0"):
        client.resolve(quant="Q4_1")
    files = client.resolve(quant="q4_0")
    assert (files.quant, files.size_bytes) == ("Q4_0", 100)
    assert hub.downloads == ["m-Q4_0.gguf"]
    folder = client.resolve(quant="bf16")
    assert folder.weights[0].endswith("/BF16/m-BF16.gguf")


def test_resolve_dense_with_a_quant_to_make_at_load(client: Client, hub: Hub) -> None:
    """A repository without GGUF files is fetched as it is, and the wish goes with it."""
    files = client.resolve(quant="Q4K")
    assert (files.format, files.quant, files.size_bytes) == ("safetensors", "q4_k", 3000)
    hub.requests.clear()
    with pytest.raises(InvalidValue, match="can be quantised to while they are"):
        client.resolve(quant="iq2_xs")
    assert hub.downloads == []


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "unreachable"])
def test_resolve_without_network_uses_the_snapshot(
    client: Client, unreachable: None, offline: bool
) -> None:
    """A model that was fetched once loads without the hub."""
    _write_snapshot(client.cache, DENSE)
    files = client.resolve(offline=offline)
    assert files.revision == COMMIT
    assert [Path(path).name for path in files.weights] == SHARDS


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "unreachable"])
def test_resolve_without_network_or_snapshot_says_what_is_cached(
    client: Client, unreachable: None, offline: bool
) -> None:
    """The error names the switches and the models there are."""
    _write_snapshot(client.cache, DENSE)
    with pytest.raises(ModelSourceError) as caught:
        client.resolve("other/model", offline=offline)
    assert "HF_HUB_OFFLINE and store.offline" in caught.value.message
    assert "org/model" in caught.value.message
    assert ("offline mode is set" if offline else "cannot be reached") in caught.value.message


def test_resolve_environment_offline_is_obeyed(
    client: Client, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's own offline variable keeps us from the network, too."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelSourceError, match="offline mode is set"):
        client.resolve()
    assert hub.requests == []


def test_resolve_incomplete_snapshot_is_named(client: Client) -> None:
    """A snapshot that lacks a shard is not taken for a model."""
    (_write_snapshot(client.cache, DENSE) / SHARDS[0]).unlink()
    with pytest.raises(ModelSourceError, match=f"lacks {SHARDS[0]}"):
        client.resolve(offline=True)


@pytest.mark.parametrize(
    ("status", "code", "text"),
    [
        (404, "RepoNotFound", "is not on the hub, or is private"),
        (403, "GatedRepo", "is gated"),
        (404, "RevisionNotFound", 'has no revision "v9"'),
        (403, "", "the hub refused"),
    ],
)
def test_resolve_refusal_is_explained(
    client: Client, hub: Hub, status: int, code: str, text: str
) -> None:
    """Each refusal says what to do; none falls back to an old snapshot."""
    hub.status, hub.error_code = status, code
    _write_snapshot(client.cache, DENSE)
    with pytest.raises(ModelSourceError, match=text):
        client.resolve("org/model@v9")


def test_resolve_server_failure_uses_the_snapshot(client: Client, hub: Hub) -> None:
    """A hub that is down is no reason not to start."""
    hub.status = 503
    _write_snapshot(client.cache, DENSE)
    assert client.resolve().revision == COMMIT


def test_resolve_cancelled_between_chunks(client: Client, hub: Hub) -> None:
    """A cancelled download ends and leaves no part behind."""
    hub.files[SHARDS[0]] = b"1" * 30_000_000
    client.cancel_at = 10_000_000
    with pytest.raises(Cancelled):
        client.resolve()
    assert max(done for _, done, _ in client.reports) < 25_000_000
    assert not list(client.cache.rglob("*.incomplete"))
    assert not list(client.cache.rglob(SHARDS[0]))


def test_resolve_too_little_disk_is_refused_first(
    client: Client, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sizes of the listing are compared with the free space before a download."""
    usage = shutil.disk_usage("/")._replace(free=2000)
    monkeypatch.setattr("engine.sources.disk.shutil.disk_usage", lambda _: usage)
    with pytest.raises(InsufficientDisk, match="3009 bytes needed, 2000 bytes free") as caught:
        client.resolve()
    assert "store.hub_cache_dir" in caught.value.message
    assert not set(SHARDS) & set(hub.downloads)


def test_resolve_disk_full_while_downloading(
    client: Client, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up during a download is named."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(InsufficientDisk, match="bytes needed"):
        client.resolve()


def test_resolve_index_naming_absent_shard_is_refused(client: Client, hub: Hub) -> None:
    """An index that does not fit its repository ends before the weights are fetched."""
    del hub.files[SHARDS[1]]
    expected: type[CortexError] = ModelSourceError
    with pytest.raises(expected, match=f"lacks {SHARDS[1]}"):
        client.resolve()
    assert hub.downloads == ["model.safetensors.index.json"]
