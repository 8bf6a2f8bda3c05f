"""The files of conf/: they load, and default.toml is the whole truth about the options."""

from __future__ import annotations

import configparser
import re
import tomllib
from pathlib import Path

import msgspec
import pytest

from cortexd.catalogue import load_catalogue
from cortexd.config import load_settings
from cortexd.keys import load_keys
from cortexd.schema import option_paths
from cortexd.settings import Settings
from cortexd.toml_lines import Path as KeyPath
from cortexd.toml_lines import key_lines

CONF = Path(__file__).resolve().parent.parent / "conf"
CATALOGUES = {"models.example.toml"}
KEYS = {"keys.example.toml"}
# A commented-out option or table: "#" and no space. Prose has a space.
_OPTION_IN_COMMENT = re.compile(r"^#(?=\S)", re.MULTILINE)


@pytest.mark.parametrize("path", sorted(CONF.glob("*.toml")), ids=lambda path: path.name)
def test_conf_file_loads(path: Path, tmp_path: Path) -> None:
    """Every TOML file is a valid configuration or catalogue."""
    if path.name in CATALOGUES:
        assert load_catalogue(str(path)).models
    elif path.name in KEYS:
        private = tmp_path / path.name
        private.write_bytes(path.read_bytes())
        private.chmod(0o600)
        assert load_keys(str(private)).keys
    else:
        assert load_settings(str(path), {}, tmp_path).source == path


def test_default_file_holds_the_defaults() -> None:
    """What default.toml sets is exactly what holds without a file."""
    document = tomllib.loads((CONF / "default.toml").read_text())
    assert msgspec.convert(document, Settings) == Settings()
    sections = msgspec.to_builtins(Settings())
    without_default = {"models_config": None, "neurons": [], "default_models": []}
    for name, value in sections.items():
        expected = value
        if isinstance(value, dict):
            expected = {key: option for key, option in value.items() if option is not None}
        assert document.get(name, without_default.get(name)) == expected, name


def test_default_file_names_every_option(tmp_path: Path) -> None:
    """With the commented-out lines it names each option once, and still loads."""
    text = _OPTION_IN_COMMENT.sub("", (CONF / "default.toml").read_text())
    path = tmp_path / "full.toml"
    path.write_text(text)
    load_settings(str(path), {}, tmp_path)
    assert _option_keys(tomllib.loads(text)) == set(option_paths(Settings))


def test_every_option_has_a_comment_above() -> None:
    """No option stands without its meaning; a group may share one comment."""
    text = (CONF / "default.toml").read_text()
    lines = text.splitlines()
    options = _OPTION_IN_COMMENT.sub("", text)
    for path, line in key_lines(options).items():
        if isinstance(tomllib.loads(options).get(str(path[0])), dict) and len(path) == 1:
            continue
        above = lines[line - 2]
        assert above.startswith("# ") or (above and not above.startswith("[")), (path, line)


def _option_keys(document: dict[str, object], prefix: KeyPath = ()) -> set[KeyPath]:
    """Return the paths of a document's values, array elements not numbered."""
    keys: set[KeyPath] = set()
    for key, value in document.items():
        path = (*prefix, key)
        tables = value if isinstance(value, list) else [value]
        if all(isinstance(table, dict) for table in tables):
            keys = keys.union(*(_option_keys(table, path) for table in tables))
        else:
            keys.add(path)
    return keys


def test_service_ends_the_whole_group_and_keeps_its_sockets_private() -> None:
    """The unit kills by control group, has a private runtime folder, and names it to the daemon."""
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(CONF / "cortexd.service")
    service = unit["Service"]
    assert service["KillMode"] == "control-group"
    assert service["RuntimeDirectory"] == "cortexd"
    assert service["RuntimeDirectoryMode"] == "0700"
    text = (CONF / "cortexd.service").read_text()
    variables = dict(re.findall(r"^Environment=(CORTEXD_\w+)=(\S+)$", text, re.MULTILINE))
    assert variables["CORTEXD_PATHS__RUNTIME_DIR"] == "%t/cortexd"
    absolute = {name: value.replace("%", "/") for name, value in variables.items()}
    settings = load_settings(None, absolute, CONF).settings
    stop_s = settings.gateway.drain_s + settings.supervision.stop_timeout_s
    assert float(service["TimeoutStopSec"]) > stop_s
