"""Keys and budgets of a running daemon, in both dialects, through crashes and restarts."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from cortexd.keys import key_digest
from tests.tree.daemon import Daemon
from tests.waiting import DEADLINE_S, wait_for

pytestmark = pytest.mark.tree

CAP = 2000
TOKENS = 40


def table(name: str, **fields: Any) -> str:
    """Return a key's table; its text is its name."""
    lines = [f'key_id = "{name}"', f'key_sha256 = "{key_digest(name)}"']
    lines += [f"{field} = {json.dumps(value)}" for field, value in fields.items()]
    return "[[keys]]\n" + "\n".join(lines) + "\n"


class Keyed:
    """A daemon that asks for keys."""

    def __init__(self, daemon: Daemon, model: str, keys_file: Path) -> None:
        self.daemon = daemon
        self.model = model
        self.keys_file = keys_file

    def ask(
        self, key: str | None, *, path: str = "/v1/chat/completions", **fields: Any
    ) -> tuple[int, Any, dict[str, str]]:
        """Ask one question; return status, answer, headers."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 8,
            **fields,
        }
        headers = {"Content-Type": "application/json"}
        if key is not None:
            headers["x-api-key"] = key
        request = urllib.request.Request(
            self.daemon.url(path), data=json.dumps(body).encode(), headers=headers
        )
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
                return response.status, json.loads(response.read()), dict(response.headers)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read()), dict(error.headers)

    def figures(self, key: str) -> tuple[int, int]:
        """Return what a key has spent and reserved."""
        entries = {entry["key_id"]: entry for entry in self.daemon.admin("keys")["keys"]}
        return entries[key]["spent"], entries[key]["reserved"]

    def settled(self, key: str) -> int:
        """Return what a key has spent, once nothing of it is reserved."""
        wait_for(lambda: self.figures(key)[1] == 0, "settling")
        return self.figures(key)[0]

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `cortexd keys`."""
        return subprocess.run(
            [sys.executable, "-m", "cortexd", "keys", *arguments],
            env=self.daemon.environment,
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).resolve().parents[2],
        )


@pytest.fixture(scope="module")
def keyed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    """A daemon with a few keys."""
    folder = tmp_path_factory.mktemp("keyed")
    keys_file = folder / "keys.toml"
    keys_file.write_text(
        table("sdk")
        + table("crowd", hard_cap=CAP)
        + table("leaver", hard_cap=100_000)
        + table("crash", hard_cap=100_000)
        + table("poor", hard_cap=5)
        + table("one", account_id="one")
        + table("two", account_id="two")
    )
    keys_file.chmod(0o600)
    environment = {"CORTEXD_ENTITLEMENTS__KEYS_FILE": str(keys_file)}
    with Daemon(folder, "--model", str(tiny_model), **environment) as daemon:
        daemon.wait_loaded(str(tiny_model))
        yield Keyed(daemon, str(tiny_model), keys_file)


def test_official_clients_are_let_in_with_a_key_and_refused_without(keyed: Keyed) -> None:
    """Each dialect's own header, its own error classes."""
    chat = openai.OpenAI(base_url=keyed.daemon.url("/v1"), api_key="sdk", max_retries=0)
    answer = chat.chat.completions.create(
        model=keyed.model, messages=[{"role": "user", "content": "hi"}], max_tokens=4
    )
    assert answer.usage is not None
    with pytest.raises(openai.AuthenticationError):
        chat.with_options(api_key="bad").models.list()
    messages = anthropic.Anthropic(base_url=keyed.daemon.url(), api_key="sdk", max_retries=0)
    message = messages.messages.create(
        model=keyed.model, messages=[{"role": "user", "content": "hi"}], max_tokens=4
    )
    assert message.usage.output_tokens > 0
    with pytest.raises(anthropic.AuthenticationError):
        messages.with_options(api_key="bad").models.list()
    with pytest.raises(anthropic.RateLimitError):
        messages.with_options(api_key="poor").messages.create(
            model=keyed.model, messages=[{"role": "user", "content": "hi"}], max_tokens=40
        )


def test_fifty_at_once_never_oversell_a_budget(keyed: Keyed) -> None:
    """The answers' usage stays within the cap and is exactly what was charged."""
    with ThreadPoolExecutor(50) as pool:
        answers = list(
            pool.map(
                lambda n: keyed.ask("crowd", messages=[{"role": "user", "content": f"q{n}"}]),
                range(50),
            )
        )
    served = [answer for status, answer, _ in answers if status == 200]
    refused = [answer for status, answer, _ in answers if status == 429]
    assert len(served) + len(refused) == 50
    used = sum(answer["usage"]["total_tokens"] for answer in served)
    assert served
    assert used <= CAP
    assert keyed.settled("crowd") == used
    assert all(answer["error"]["code"] == "insufficient_quota" for answer in refused)
    while keyed.ask("crowd")[0] == 200:  # what was only reserved has come back
        assert keyed.settled("crowd") <= CAP
    assert keyed.settled("crowd") <= CAP


def test_client_that_leaves_a_stream_pays_for_what_it_got(keyed: Keyed) -> None:
    """The charge lies between what was read and what was asked for."""
    body = {
        "model": keyed.model,
        "messages": [{"role": "user", "content": "hello"}],
        "stream": True,
        "max_tokens": 400,
        "ignore_eos": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", keyed.daemon.api_port, timeout=DEADLINE_S)
    headers = {"Authorization": "Bearer leaver"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    for _ in range(8):
        response.readline()
    assert response.fp is not None
    response.close()
    connection.close()
    assert 4 < keyed.settled("leaver") < 450


def test_killed_owner_and_front_leave_neither_debt_nor_block(keyed: Keyed) -> None:
    """Budgets and front die under traffic; afterwards the key still works and nothing is held."""
    before = keyed.settled("crash")

    def ask(number: int) -> int:
        try:
            return keyed.ask("crash", max_tokens=TOKENS, ignore_eos=True)[0]
        except (OSError, http.client.HTTPException):
            return 0

    for victim in ("budgets", "front.0"):
        with ThreadPoolExecutor(8) as pool:
            with keyed.daemon.paused(keyed.daemon.leader(keyed.model)):
                asked = [pool.submit(ask, number) for number in range(8)]
                wait_for(lambda: keyed.figures("crash")[1] > 0, "a reservation")
                pid = keyed.daemon.kill(victim)
            statuses = [one.result() for one in asked]
        keyed.daemon.wait_back(victim, pid)
        if victim == "budgets":
            assert statuses == [200] * 8
    wait_for(lambda: ask(8) == 200, "an answer")
    spent = keyed.settled("crash")
    assert spent >= before + 8 * TOKENS


def test_keys_are_added_and_revoked_while_the_daemon_runs(keyed: Keyed) -> None:
    """The command edits the file, the daemon follows; a broken file changes nothing."""
    secret = keyed.command("add", "late", "--cap", "5000", "--window", "60").stdout.strip()
    wait_for(lambda: keyed.ask(secret)[0] == 200, "letting the new key in")
    spent = keyed.settled("late")
    row = next(
        line for line in keyed.command("list").stdout.splitlines() if line.startswith("late")
    )
    assert row.split() == ["late", "late", "all", "5000", "60", "s", str(spent), "0"]
    good = keyed.keys_file.read_bytes()
    keyed.keys_file.write_bytes(good + b"[[keys]]\n")
    (reload,) = (one for one in keyed.daemon.admin("reload")["files"] if "keys" in one["file"])
    assert reload["status"] == "rejected"
    assert keyed.ask(secret)[0] == 200
    keyed.keys_file.write_bytes(good)
    keyed.command("revoke", "late")
    wait_for(lambda: keyed.ask(secret)[0] == 401, "refusing the revoked key")
    assert secret not in keyed.daemon.log()


def test_accounts_do_not_see_each_others_cache(keyed: Keyed) -> None:
    """The same long prompt is cached for the account that sent it, and for no other."""
    content = "the quick brown fox jumps over the lazy dog " * 9

    def cached(key: str) -> int:
        status, answer, _ = keyed.ask(key, messages=[{"role": "user", "content": content}])
        assert status == 200
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached("one") == 0
    assert cached("two") == 0
    assert cached("one") > 0
    assert cached("two") > 0


def test_log_and_metrics_name_key_and_account_and_no_secret(keyed: Keyed) -> None:
    """One line per request, 401s included; spend is exported by account and key."""

    def lines() -> list[dict[str, Any]]:
        found = [line for line in keyed.daemon.log().splitlines() if "request.finished" in line]
        return [json.loads(line[line.index("{") :]) for line in found]

    before = len(lines())
    assert keyed.ask("sdk")[0] == 200
    assert keyed.ask("never-a-key")[0] == 401

    def ends() -> list[tuple[int, object]]:
        # A request that an earlier test left may end only now.
        return [(line["status"], line.get("key") or line.get("error")) for line in lines()[before:]]

    wait_for(lambda: {(200, "sdk"), (401, "invalid_api_key")} <= set(ends()), "both lines")
    assert ends().count((200, "sdk")) == 1
    assert "never-a-key" not in keyed.daemon.log()

    def exports(line: str) -> bool:
        return line in keyed.daemon.get("/metrics", port=keyed.daemon.metrics_port)[1]

    wait_for(lambda: exports('cortex_spend_tokens_total{account="sdk",key="sdk"}'), "the spend")
    wait_for(
        lambda: exports('cortex_budget_limit_tokens{account="poor",key="poor"} 5.0'), "the limit"
    )


def test_restarted_daemon_remembers_what_was_spent(keyed: Keyed) -> None:
    """The journal outlives the whole tree."""
    spent = keyed.settled("crowd")
    assert spent > 0
    assert keyed.daemon.stop() == []
    keyed.daemon.start()
    keyed.daemon.wait_ready()
    keyed.daemon.wait_loaded(keyed.model)
    assert keyed.settled("crowd") == spent
    assert keyed.ask("crowd", max_tokens=CAP)[0] == 429
