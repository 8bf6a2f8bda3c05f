"""The keys file: who may read it, what it may say, how keys are recognised."""

from __future__ import annotations

from pathlib import Path

import pytest

from cortexd.errors import ConfigError
from cortexd.keys import (
    Key,
    Keys,
    check_secrets,
    key_changes,
    key_digest,
    load_keys,
    new_key,
    node_keys,
)
from cortexd.settings import Entitlements, NeuronEntry, Settings

DIGEST = key_digest("secret")


def write(path: Path, text: str, mode: int = 0o600) -> str:
    """Write a private file; return its path."""
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def entry(**fields: str) -> str:
    """Return a key's table as TOML; values are written as they are."""
    values = {"key_id": '"a"', "key_sha256": f'"{DIGEST}"'} | fields
    return "[[keys]]\n" + "".join(f"{name} = {value}\n" for name, value in values.items())


def test_digest_is_sha256_and_keys_are_long() -> None:
    """The digest is the one of `sha256sum`; no two keys are alike."""
    assert key_digest("abc").startswith("ba7816bf8f01cfea414140de5dae2223")
    assert len(new_key()) > 48
    assert new_key() != new_key()


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640])
def test_private_file_is_read(tmp_path: Path, mode: int) -> None:
    """The owner, and a group that may read."""
    assert load_keys(write(tmp_path / "k", entry(), mode)).keys[0].account == "a"


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o604, 0o602])
def test_file_that_others_may_read_or_change_is_refused(tmp_path: Path, mode: int) -> None:
    """The message says what to do."""
    with pytest.raises(ConfigError, match="chmod 600"):
        load_keys(write(tmp_path / "k", entry(), mode))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (entry(key_sha256='"abc"'), "3: keys[0].key_sha256 is no SHA-256"),
        (entry(key_id='"a b"'), '2: keys[0].key_id: "a b" is no name'),
        (entry(account_id='""'), '4: keys[0].account_id: "" is no name'),
        (entry(hard_cap="0"), "4: keys[0].hard_cap must be an integer >= 1"),
        (entry(window='{kind = "rolling"}', hard_cap="1"), "4: keys[0].window: allowed:"),
        (entry(window='{seconds = 5}', hard_cap="1"), "4: keys[0].window: allowed:"),
        (entry(window='{kind = "balance"}'), "4: keys[0].window bounds nothing without hard_cap"),
        (entry(keyid="1"), "4: keys[0].keyid is an unknown key"),
        (entry() + entry(key_sha256=f'"{"0" * 64}"'), "5: keys[1].key_id is also that of keys[0]"),
        (entry() + entry(key_id='"b"'), "6: keys[1].key_sha256 is also that of keys[0]"),
    ],
)  # fmt: skip
def test_error_names_line_and_key(tmp_path: Path, text: str, expected: str) -> None:
    """One mistake gives one line; digests are not repeated."""
    path = tmp_path / "keys.toml"
    with pytest.raises(ConfigError) as caught:
        load_keys(write(path, text))
    assert f"{path}:{expected}" in caught.value.message
    assert DIGEST not in caught.value.message


def test_models_are_patterns() -> None:
    """Without a list all models are open; with one, those it matches."""
    assert Key(key_id="a", key_sha256=DIGEST).may_use("any/model")
    key = Key(key_id="a", key_sha256=DIGEST, models=["tier/*", "org/one"])
    assert key.may_use("tier/small")
    assert key.may_use("org/one")
    assert not key.may_use("org/one-more")
    assert not key.may_use("my/tier/small")


def test_changes_name_keys_and_no_secrets() -> None:
    """A reload shows what was added, removed and changed."""
    one, two = (Key(key_id=name, key_sha256=key_digest(name)) for name in ("one", "two"))
    capped = Key(key_id="two", key_sha256=key_digest("two"), hard_cap=1)
    assert key_changes(Keys([one]), Keys([two])) == ['+ key "two"', '- key "one"']
    assert key_changes(Keys([two]), Keys([capped])) == ['~ key "two"']


def test_neuron_key_is_one_line_of_a_private_file(tmp_path: Path) -> None:
    """All files of secrets are checked before anything starts."""
    path = write(tmp_path / "beast.key", "sk-one\n")
    neurons = [
        NeuronEntry(name="beast", endpoint="http://b", key_file=path),
        NeuronEntry(name="open", endpoint="http://o"),
    ]
    assert node_keys(neurons) == {"beast": "sk-one"}
    for text, mode in (("", 0o600), ("two words", 0o600), ("sk-one", 0o644)):
        write(Path(path), text, mode)
        with pytest.raises(ConfigError, match=r"beast\.key"):
            check_secrets(Settings(neurons=neurons))
    with pytest.raises(ConfigError, match="absent"):
        check_secrets(Settings(entitlements=Entitlements(keys_file=str(tmp_path / "absent"))))
