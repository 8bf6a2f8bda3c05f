"""`cortexd chat`: a streaming conversation in the terminal, over the HTTP API like any client.

Ctrl-C stops an answer (the server frees its place at once), Ctrl-D leaves. What was said so far
stays in the history, a stopped answer with what had come of it. At a terminal the model's reasoning
is shown as it comes (on standard error: it is no part of the answer).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Final

from cli import format as fmt
from cli.control import settings_of
from cli.exit_code import NOT_FOUND, OK, CommandError
from cli.sse import KEY_VARIABLE, ApiClient, Document
from cortexd.address import parse_host_port
from cortexd.errors import CortexError
from cortexd.model_id import absolute_model_id
from cortexd.paths import home_dir

_PROMPT: Final = "> "


def chat(args: argparse.Namespace) -> int:
    """Talk until the end of input. Raises: CommandError when there is nobody to talk to."""
    url = args.url or parse_host_port(settings_of(args).settings.gateway.listen).url()
    client = ApiClient(url, os.environ.get(KEY_VARIABLE, ""))
    if args.model:
        model = absolute_model_id(args.model, Path.cwd(), home_dir())  # as `cortexd load` takes it
    else:
        model = first_model(client)
    interactive = sys.stdin.isatty()
    conversation = Conversation(
        client,
        model,
        _sampling(args),
        args.system,
        on_reasoning=_show_reasoning if interactive else lambda text: None,
    )
    if interactive:
        # Importing it gives `input` line editing and history.
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")
        print(f"{model} at {client.url}; Ctrl-C stops an answer, Ctrl-D leaves", file=sys.stderr)
    for question in _questions(interactive=interactive):
        _answer(conversation, question, interactive=interactive)
    return OK


class Conversation:
    """The messages so far, and the way to the model."""

    def __init__(
        self,
        client: ApiClient,
        model: str,
        sampling: Document,
        system: str | None = None,
        *,
        on_reasoning: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.messages: list[Document] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self._client = client
        self._model = model
        self._sampling = sampling
        self._on_reasoning = on_reasoning

    def ask(self, question: str) -> Generator[str, None, None]:
        """Yield the answer piece by piece, then keep both sides in the history.

        A question without any answer (an error, or stopped at once) is not kept.
        """
        question_message: Document = {"role": "user", "content": question}
        body: Document = {
            "model": self._model,
            "messages": [*self.messages, question_message],
            "stream": True,
            **self._sampling,
        }
        answer = ""
        is_reasoning = False
        try:
            with contextlib.closing(self._client.stream("/v1/chat/completions", body)) as events:
                for event in events:
                    piece = _delta(event, "content")
                    thought = _delta(event, "reasoning_content")
                    if piece and is_reasoning:
                        thought = "\n\n"  # sets the answer off
                    is_reasoning = (is_reasoning or bool(thought)) and not piece
                    if thought:
                        self._on_reasoning(thought)
                    answer += piece
                    if piece:
                        yield piece
        finally:
            if answer:
                self.messages += [question_message, {"role": "assistant", "content": answer}]


def first_model(client: ApiClient) -> str:
    """Return the first loaded model's id, else the first that can be loaded.

    Raises: CommandError (exit 4) when the server has none.
    """
    data = client.get("/v1/models").get("data")
    models = [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []
    models.sort(key=lambda entry: not entry.get("loaded"))
    for entry in models:
        if isinstance(entry.get("id"), str):
            return str(entry["id"])
    raise CommandError(f"{client.url} has no model; load one with: cortexd load ID", NOT_FOUND)


def _sampling(args: argparse.Namespace) -> Document:
    options = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    return {name: value for name, value in options.items() if value is not None}


def _questions(*, interactive: bool) -> Iterator[str]:
    while True:
        try:
            line = input(_PROMPT if interactive else "")
        except EOFError:
            if interactive:
                print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print(file=sys.stderr)  # Ctrl-C at the prompt drops the line, as shells do
            continue
        if line.strip():
            yield line


def _answer(conversation: Conversation, question: str, *, interactive: bool) -> None:
    """Print one answer. At a terminal an error or Ctrl-C ends the answer, not the conversation."""
    pieces = conversation.ask(question)
    try:
        for piece in pieces:
            print(fmt.printable(piece), end="", flush=True)
        print()
    except KeyboardInterrupt:
        pieces.close()
        if not interactive:
            raise
        print(" [stopped]")
    except CortexError as error:
        if not interactive:
            raise
        print()
        fmt.complain(fmt.error_line(error))


def _show_reasoning(text: str) -> None:
    dim = fmt.coloured(fmt.printable(text), "dim", enabled=fmt.has_colour(sys.stderr))
    print(dim, end="", file=sys.stderr, flush=True)


def _delta(event: Document, field: str) -> str:
    """Return what one chat.completion.chunk adds to a text field of the message."""
    choices = event.get("choices")
    if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
        return ""
    delta = choices[0].get("delta")
    content = delta.get(field) if isinstance(delta, dict) else None
    return content if isinstance(content, str) else ""
