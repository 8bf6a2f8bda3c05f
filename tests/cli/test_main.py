"""The command line itself: parsing, errors as one line, exit codes, and how little it imports."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from actors.node import bind_listeners
from cli import exit_code
from cli.main import main
from cortexd import __version__, errors
from cortexd.settings import Gateway, Settings

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("start", "status", "stop", "models", "load", "unload", "pull", "chat", "logs", "config")


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """`version` and `--version` tell the package's version."""
    assert main(["version"]) == 0
    assert main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"cortexd {__version__} (python ")
    assert lines[1] == f"cortexd {__version__}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--help works for each command and names --config."""
    assert main([command, "--help"]) == 0
    assert "--config" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["logs", "-n", "513"],
        ["logs", "-n", "x"],
        ["load", "a/b", "--devices", "0,x"],
        ["load", "a/b", "--tp", "²"],
        ["start", "--role", "king"],
        ["config", "frobnicate"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Usage errors are told on standard error, with exit code 2."""
    assert main(arguments) == exit_code.USAGE
    assert "usage: cortexd" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["status"], ["stop"], ["models"], ["load", "a/b"], ["unload", "a/b"]],
)
def test_not_running_is_one_line_and_exit_3(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a daemon each command says so, and how to start one."""
    assert main(arguments) == exit_code.NOT_RUNNING
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("cortexd: not running: nothing answers at ")
    assert err.endswith("start it with: cortexd start\n")
    assert err.count("\n") == 1


def test_logs_of_a_stopped_daemon_are_pointed_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a crash they are what is wanted."""
    (tmp_path / "cortex.toml").write_text('[paths]\nstate_dir = "kept"')
    assert main(["logs"]) == exit_code.NOT_RUNNING
    assert capsys.readouterr().err.endswith(f"what was written before: {tmp_path}/kept/logs\n")


def test_bad_configuration_exits_2_without_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A configuration error is printed as it is."""
    (tmp_path / "cortex.toml").write_text("[gateway]\nlistne = 1")
    assert main(["status"]) == exit_code.USAGE
    err = capsys.readouterr().err
    assert err.startswith(f"cortexd: {tmp_path}/cortex.toml:2: gateway.listne is an unknown key")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "own.toml", "config", "check"],
        ["config", "check", "--config", "own.toml"],
        ["--config", "other.toml", "config", "--config", "own.toml", "check"],
    ],
)
def test_configuration_may_be_named_before_the_command_and_after_it(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """As with most commands."""
    (tmp_path / "own.toml").write_text("")
    assert main(arguments) == exit_code.OK
    assert capsys.readouterr().out == f"ok: {tmp_path}/own.toml\n"


def test_error_classes_have_their_exit_codes() -> None:
    """What kind of error ended a command can be told from the exit code."""
    expected = {
        errors.ConfigError: 2,
        errors.ModelNotFound: 4,
        errors.NotFound: 4,
        errors.InvalidValue: 2,
        errors.Cancelled: 130,
        errors.NotRunning: 3,
        errors.AlreadyRunning: 5,
        errors.Overloaded: 5,
        errors.InsufficientMemory: 5,
        errors.DeadlineExceeded: 124,
        errors.BadModelFile: 1,
        errors.Internal: 1,
    }
    assert {kind: exit_code.of_error(kind("x")) for kind in expected} == expected


def test_status_of_a_stopped_daemon_imports_nothing_heavy() -> None:
    """The command's start-up cost is that of the standard library and msgspec."""
    script = (
        "import sys; from cli.main import main; code = main(['status']); "
        "heavy = {'torch', 'aiohttp', 'rich', 'zmq', 'asyncio', 'huggingface_hub', 'engine'}; "
        "print(code, sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "3 []\n"


def test_module_is_the_command() -> None:
    """`python -m cortexd` is the same as `cortexd`, exit codes included."""
    done = subprocess.run(
        [sys.executable, "-m", "cortexd", "models"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == exit_code.NOT_RUNNING
    assert done.stderr.startswith("cortexd: not running")


def test_interrupt_while_the_command_is_imported_ends_it_quietly() -> None:
    """Ctrl-C in the first tenths of a second gives no traceback, but the code of any other."""
    script = (
        "import sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'cli.main': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "from cortexd.__main__ import main\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (exit_code.INTERRUPTED, "")


def test_start_in_a_folder_too_deep_for_sockets_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system's limit is met before anything is started or made."""
    folder = tmp_path / ("deep" * 30)
    monkeypatch.setenv("CORTEXD_PATHS__RUNTIME_DIR", str(folder))
    assert main(["start"]) == exit_code.USAGE
    assert capsys.readouterr().err.startswith(f"cortexd: {folder}: a path of ")
    assert not folder.exists()


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        ("192.0.2.1:0", "no interface of this machine has the address; set gateway.listen"),
        ("taken", "stop what uses the port "),
    ],
)
def test_address_that_cannot_be_bound_is_told_with_what_to_do(address: str, hint: str) -> None:
    """A taken port and an address of another machine are different mistakes."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        if address == "taken":
            address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(errors.ConfigError, match=re.escape(hint)):
            bind_listeners(Settings(gateway=Gateway(listen=address)))


def test_reader_that_leaves_ends_the_command_quietly() -> None:
    """`cortexd ... | head` gives no traceback."""
    script = f"exec {sys.executable} -m cortexd config show | exec true"
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
