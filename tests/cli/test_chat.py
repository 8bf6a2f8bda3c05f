"""`cortexd chat`: streaming, history, stopping an answer, errors."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.chat import Conversation, first_model
from cli.exit_code import CommandError
from cli.main import main
from cli.sse import ApiClient, events
from cortexd.errors import CortexError, EngineRestarting, Internal, ModelNotFound
from tests.cli.fake_api import FakeApi, running_api, sse
from tests.waiting import DEADLINE_S


@pytest.fixture
def api() -> Iterator[FakeApi]:
    """A server that answers as told."""
    with running_api() as server:
        server.models = [{"id": "a/cold", "loaded": False}, {"id": "a/warm", "loaded": True}]
        yield server


def test_chat_streams_answers_and_keeps_history(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each line is a turn; the next one carries what was said; control characters are dropped."""
    api.replies = [sse("Pa", "ris", "\x1b[2J"), sse("Rome")]
    monkeypatch.setattr("sys.stdin", io.StringIO("France?\n\nItaly?\n"))
    arguments = ["--system", "Be brief.", "--max-tokens", "8", "--temperature", "0"]
    assert main(["chat", "--url", api.url, *arguments]) == 0
    assert capsys.readouterr().out == "Paris[2J\nRome\n"
    assert api.bodies[0] == {
        "model": "a/warm",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "France?"},
        ],
        "stream": True,
        "max_tokens": 8,
        "temperature": 0.0,
    }
    assert api.bodies[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "France?"},
        {"role": "assistant", "content": "Paris\x1b[2J"},
        {"role": "user", "content": "Italy?"},
    ]


def test_chat_shows_the_key_of_its_environment(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that asks for one; without it the error names the variable."""
    api.api_key = "sk-1"
    api.replies = [sse("Paris")]
    for model in ([], ["a/warm"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("France?\n"))
        assert main(["chat", *model, "--url", api.url]) == 1
        told = "no key was given; this command reads it from $CORTEXD_API_KEY"
        assert told in capsys.readouterr().err
    monkeypatch.setenv("CORTEXD_API_KEY", "sk-1")
    monkeypatch.setattr("sys.stdin", io.StringIO("France?\n"))
    assert main(["chat", "--url", api.url]) == 0
    assert capsys.readouterr().out == "Paris\n"


def test_model_may_be_a_path_as_for_load(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A relative one is the file in this folder; other names stay as they are."""
    monkeypatch.chdir(tmp_path)
    for given, sent in (("./m.gguf", f"{tmp_path}/m.gguf"), ("tier/small", "tier/small")):
        api.replies = [sse("ok")]
        monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
        assert main(["chat", given, "--url", api.url]) == 0
        assert api.bodies[-1]["model"] == sent


def test_reasoning_is_shown_apart_and_not_kept(api: FakeApi) -> None:
    """Reasoning goes to its own listener, closed off before the answer; history has words only."""
    thought = b'data: {"choices": [{"delta": {"reasoning_content": "hm"}}]}\n\n'
    api.replies = [thought + sse("yes"), thought + sse("no")]
    thoughts: list[str] = []
    conversation = Conversation(ApiClient(api.url), "a/warm", {}, on_reasoning=thoughts.append)
    assert list(conversation.ask("?")) == ["yes"]
    assert thoughts == ["hm", "\n\n"]  # never empty: a dim nothing is bytes on a terminal
    assert conversation.messages[-1] == {"role": "assistant", "content": "yes"}
    assert list(Conversation(ApiClient(api.url), "a/warm", {}).ask("?")) == ["no"]


def test_stopped_answer_leaves_the_server_and_stays_in_the_history(api: FakeApi) -> None:
    """Closing the answer closes the connection at once; what had come is kept."""
    api.replies = [sse("One", " two", done=False), sse("ok")]
    conversation = Conversation(ApiClient(api.url), "a/warm", {})
    answer = conversation.ask("Count.")
    assert next(answer) == "One"
    assert next(answer) == " two"
    answer.close()
    assert api.client_left.wait(DEADLINE_S)
    assert conversation.messages[-1] == {"role": "assistant", "content": "One two"}
    assert list(conversation.ask("Go on.")) == ["ok"]


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        (
            (404, {"error": {"code": "model_not_found", "message": "no model"}}),
            ModelNotFound,
            "no model",
        ),
        ((500, {}), Internal, "the server answered with HTTP status 500"),
        (
            b'data: {"error": {"code": "engine_restarting", "message": "again"}}\n\n',
            EngineRestarting,
            "again",
        ),
        (b'data: {"x": "END"}\n\n', Internal, "the answer broke off"),
    ],
)
def test_failed_question_is_an_error_and_not_kept(
    api: FakeApi, reply: bytes, error: type[CortexError], message: str
) -> None:
    """Refusals, error events and broken streams are told apart; the history stays as it was."""
    api.replies = [reply]
    conversation = Conversation(ApiClient(api.url), "a/warm", {})
    with pytest.raises(error, match=message):
        list(conversation.ask("?"))
    assert conversation.messages == []


def test_error_in_a_pipe_ends_the_command(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a terminal an error is final, with its exit code."""
    api.replies = [(404, {"error": {"code": "model_not_found", "message": "no model x"}})]
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    assert main(["chat", "a/x", "--url", api.url]) == 4
    assert capsys.readouterr().err == "cortexd: no model x\n"


def test_error_at_a_terminal_ends_only_the_answer(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a terminal the conversation goes on; Ctrl-C at the prompt drops the line."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    answers: Iterator[str | type[BaseException]] = iter(["a", KeyboardInterrupt, "b", EOFError])

    def fake_input(prompt: str) -> str:
        answer = next(answers)
        if isinstance(answer, str):
            return answer
        raise answer

    api.replies = [(503, {"error": {"code": "model_loading", "message": "wait"}}), sse("fine")]
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", fake_input)
    assert main(["chat", "--url", api.url]) == 0
    out, err = capsys.readouterr()
    assert out == "\nfine\n"
    assert "cortexd: wait\n" in err


def test_loaded_model_is_preferred_and_none_is_an_error(api: FakeApi) -> None:
    """The default model is a loaded one, else one that can be loaded."""
    client = ApiClient(api.url)
    assert first_model(client) == "a/warm"
    api.models = [{"id": "a/cold"}]
    assert first_model(client) == "a/cold"
    api.models = []
    with pytest.raises(CommandError, match="has no model; load one") as caught:
        first_model(client)
    assert caught.value.exit_code == 4


def test_nobody_listening_is_not_running(capsys: pytest.CaptureFixture[str]) -> None:
    """A refused connection gives the same exit code as a missing admin socket."""
    with running_api() as server:
        url = server.url
    assert main(["chat", "--url", url]) == 3
    assert "not running: nothing answers at" in capsys.readouterr().err
    assert main(["chat", "--url", "ftp://x"]) == 2


def test_events_join_data_lines_and_skip_comments() -> None:
    """The stream format's own rules: comments, CRLF, several data lines, other fields."""
    lines = [b": hi\r\n", b"\r\n", b"event: x\n", b'data: {"a":\n', b"data:1}\n", b"\n"]
    lines += [b"data: [DONE]\n", b"\n", b"data: never\n", b"\n"]
    assert list(events(lines)) == [{"a": 1}]
