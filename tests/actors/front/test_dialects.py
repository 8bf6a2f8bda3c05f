"""Stream encoders: the fast path writes the same bytes as the structs."""

from __future__ import annotations

import pytest

from actors.front.chat import ChatEncoder
from actors.front.choice import ChoiceOutput
from actors.front.completions import CompletionEncoder
from actors.front.dialect import Answer, data_event
from cortexd.openai import (
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    Completion,
    CompletionChoice,
)
from engine.text.answer import Text

TEXTS = ["a", 'quote " and \\ and \n', "\x00", "日本 🙂", "data: [DONE]\n\n"]
ANSWER = Answer(id="x-1", created=5, model="m\x00m", request_id="r", fingerprint="fp_1")


@pytest.mark.parametrize("text", TEXTS)
def test_chat_text_event_equals_the_encoded_struct(text: str) -> None:
    """Role event first, then one event whose bytes are those of a whole chunk struct."""
    chunks = ChatEncoder(ANSWER).chunk(ChoiceOutput(2, [Text(text)]))
    expected = b"".join(
        data_event(
            ChatChunk(
                id="x-1",
                created=5,
                model="m\x00m",
                system_fingerprint="fp_1",
                choices=[ChatChunkChoice(index=2, delta=delta)],
            )
        )
        for delta in (ChatDelta(role="assistant", content=""), ChatDelta(content=text))
    )
    assert chunks == expected
    assert chunks.count(b"\n\n") == 2


@pytest.mark.parametrize("text", TEXTS)
def test_completion_text_event_equals_the_encoded_struct(text: str) -> None:
    """The same for the legacy endpoint."""
    event = CompletionEncoder(ANSWER).chunk(ChoiceOutput(2, [Text(text)]))
    expected = Completion(
        id="x-1",
        created=5,
        model="m\x00m",
        system_fingerprint="fp_1",
        choices=[CompletionChoice(index=2, text=text)],
    )
    assert event == data_event(expected)
