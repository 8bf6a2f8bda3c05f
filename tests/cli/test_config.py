"""`cortexd config check|show`."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec
import pytest

from cli.main import main
from cortexd.settings import Settings


def test_check_names_the_files_it_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A good configuration is confirmed, warnings go to standard error."""
    (tmp_path / "models.toml").write_text('[aliases]\na = "x/y"')
    path = tmp_path / "cortex.toml"
    path.write_text('[gateway]\nlisten = "0.0.0.0:31313"')
    assert main(["config", "check"]) == 0
    out, err = capsys.readouterr()
    assert out == f"ok: {path}, {tmp_path}/models.toml\n"
    assert "cortexd: warning: gateway.listen = 0.0.0.0:31313 can be reached" in err
    assert 'cortexd: warning: alias "a" means "x/y"' in err


def test_check_reports_every_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All errors at once, exit code 2; the catalogue is checked too."""
    path = tmp_path / "other.toml"
    path.write_text('role = "x"\nfoo = 1')
    assert main(["config", "check", "--config", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("cortexd: the configuration has 2 errors:\n")
    assert f"{path}:1: role must be" in err
    assert f"{path}:2: foo is an unknown key" in err
    path.write_text('models_config = "absent.toml"')
    assert main(["config", "check", "--config", str(path)]) == 2
    assert "model catalogue" in capsys.readouterr().err


def test_show_prints_what_is_in_force(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The output is a configuration file that means the same."""
    monkeypatch.setenv("CORTEXD_ENGINE__BLOCK_SIZE", "16")
    monkeypatch.setenv("CORTEXD_DEFAULT_MODELS", '[{model_id = "a/b", devices = [0]}]')
    assert main(["config", "show"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# settings in force; read from: no file; defaults and environment\n")
    settings = msgspec.convert(tomllib.loads(out), Settings)
    assert settings.engine.block_size == 16
    assert settings.default_models[0].devices == [0]
    assert settings.gateway == Settings().gateway
