"""A gateway and a neuron that both ask for keys."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.tree.daemon import Daemon
from tests.tree.test_keys import table
from tests.waiting import DEADLINE_S, wait_for

pytestmark = pytest.mark.tree


@dataclass(slots=True)
class Pair:
    """Both daemons and the model of the neuron."""

    gateway: Daemon
    neuron: Daemon
    model: str


def ask(url: str, key: str | None, body: Any = None, **headers: str) -> tuple[int, Any]:
    """GET, or POST a body, with a key; return status and answer."""
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def secret(path: Path, text: str) -> str:
    """Write a private file; return its path."""
    path.write_text(text)
    path.chmod(0o600)
    return str(path)


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A neuron that knows the gateway's key, and a gateway with two clients."""
    folder = tmp_path_factory.mktemp("keyed-fleet")
    for name in ("neuron", "gateway"):
        (folder / name).mkdir()
    neuron = Daemon(
        folder / "neuron",
        "--model",
        str(tiny_model),
        CORTEXD_ENTITLEMENTS__KEYS_FILE=secret(
            folder / "neuron.toml", table("gw", gateway=True) + table("plain")
        ),
    )
    gateway = Daemon(
        folder / "gateway",
        "--role",
        "gateway",
        CORTEXD_ENTITLEMENTS__KEYS_FILE=secret(
            folder / "gateway.toml",
            table("alice", account_id="team", hard_cap=500) + table("bob"),
        ),
        CORTEXD_NEURONS=(
            f'[{{name = "far", endpoint = "http://127.0.0.1:{neuron.neuron_port}", '
            f'key_file = "{secret(folder / "far.key", "gw")}"}}]'
        ),
    )
    with neuron, gateway:
        neuron.wait_loaded(str(tiny_model))

        def is_seen() -> bool:
            models = gateway.admin("models")["models"]
            return any(one["node"] == "far" and one["state"] == "loaded" for one in models)

        wait_for(is_seen, "the gateway's view of the neuron")
        yield Pair(gateway, neuron, str(tiny_model))


def test_gateway_uses_its_own_key_and_names_the_account(pair: Pair) -> None:
    """The neuron knows whose request it is; the client's key and claims never get there."""
    body = {"model": pair.model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    claims = {"x-cortexd-account": "boss"}
    url = pair.gateway.url("/v1/chat/completions")
    assert ask(url, None, body)[0] == 401
    status, answer = ask(url, "alice", body, **claims)
    assert status == 200, answer

    def line() -> dict[str, Any]:
        found = [one for one in pair.neuron.log().splitlines() if '"request.finished"' in one]
        return dict(json.loads(found[-1][found[-1].index("{") :])) if found else {}

    wait_for(line, "the neuron's line")
    assert (line()["account"], line()["key"]) == ("team", "alice")
    wait_for(lambda: spent(pair) == answer["usage"]["total_tokens"], "the charge")


def spent(pair: Pair) -> int:
    """Return what alice has spent."""
    entries = {one["key_id"]: one for one in pair.gateway.admin("keys")["keys"]}
    assert isinstance(entries["alice"]["spent"], int)
    return entries["alice"]["spent"]


def test_budget_of_the_gateway_bounds_what_its_neuron_does(pair: Pair) -> None:
    """An answer without a bound of its own is taken for long, and refused here."""
    body = {"model": pair.model, "messages": [{"role": "user", "content": "hi"}]}
    status, answer = ask(pair.gateway.url("/v1/messages"), "alice", body | {"max_tokens": 450})
    assert status == 200, answer
    status, answer = ask(pair.gateway.url("/v1/chat/completions"), "alice", body)
    assert (status, answer["error"]["code"]) == (429, "insufficient_quota")


def test_neuron_is_managed_by_its_gateway_alone(pair: Pair) -> None:
    """A client's key opens inference there, and nothing else; no key opens only the probes."""
    url = f"http://127.0.0.1:{pair.neuron.neuron_port}"
    assert ask(url + "/livez", None)[0] == 200
    for path in ("/models", "/health", "/discovery"):
        assert [ask(url + path, key)[0] for key in (None, "plain", "gw")] == [401, 403, 200]
    body = {"model_id": pair.model}
    assert ask(url + "/models/unload", "plain", body)[0] == 403
    assert pair.neuron.models()[pair.model]["state"] == "loaded"
