"""Tables, sizes, durations, colour, and text that cannot control the terminal."""

from __future__ import annotations

import io

import pytest

from cli import format as fmt


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (102_685_000, "97.9 MiB"),
        (1024**3 - 1, "1.0 GiB"),
        (3 * 1024**4, "3.0 TiB"),
    ],
)
def test_size_is_readable(num_bytes: int, text: str) -> None:
    """Binary units, one digit."""
    assert fmt.size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0.0s"),
        (0.42, "0.4s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.6, "1m00s"),
        (192, "3m12s"),
        (18120, "5h02m"),
        (273600, "3d04h"),
    ],
)
def test_duration_is_readable(seconds: float, text: str) -> None:
    """Two units at most."""
    assert fmt.duration(seconds) == text


def test_table_aligns_also_with_colour() -> None:
    """Escape sequences take no room; numbers stand right."""
    green = fmt.coloured("ok", "green", enabled=True)
    text = fmt.table(["NAME", "STATE", ">PID"], [["a", green, "7"], ["bcdef", "failed", "123"]])
    assert text.replace("\x1b[32m", "").replace("\x1b[0m", "").split("\n") == [
        "NAME   STATE   PID",
        "a      ok        7",
        "bcdef  failed  123",
    ]


def test_colour_needs_a_terminal_that_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """No colour into files, for NO_COLOR, or on a dumb terminal."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert fmt.has_colour(Terminal())
    assert not fmt.has_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not fmt.has_colour(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not fmt.has_colour(Terminal())


def test_states_have_their_colours() -> None:
    """Good is green, on its way yellow, bad red; an unknown state stays plain."""
    assert fmt.state("ready", colour=True) == "\x1b[32mready\x1b[0m"
    assert fmt.state("loading", colour=True) == "\x1b[33mloading\x1b[0m"
    assert fmt.state("failed", colour=True) == "\x1b[31mfailed\x1b[0m"
    assert fmt.state("novel", colour=True) == "novel"
    assert fmt.state("ready", colour=False) == "ready"


def test_foreign_text_cannot_control_the_terminal() -> None:
    """Escape, bell, carriage return and C1 controls are dropped; text and layout stay."""
    assert fmt.printable("a\x1b]0;evil\x07b\r\nc\td\x9b31mé") == "a]0;evilb\nc\td31mé"
