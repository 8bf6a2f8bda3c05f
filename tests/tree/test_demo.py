"""The demo model itself: fetched from the package index, quantised, talking."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import pytest

from cortexd.demo import DEMO_ALIAS, DEMO_MODEL
from cortexd.paths import cache_dir
from cortexd.settings import Store
from engine.sources import resolve
from tests.engine.text.chat_templates import THINKING_WITH_TOOLS
from tests.tree.daemon import Daemon, streamed_text

pytestmark = [pytest.mark.tree, pytest.mark.slow]

CAPITAL = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}


def test_demo_answers_a_question_the_same_way_however_it_is_asked(tmp_path: Path) -> None:
    """The demo knows the capital of France; streamed, alone or among sixteen alike."""
    question = "What is the capital of France?"
    with Daemon(tmp_path, "--demo", CORTEXD_ENGINE__NUM_THREADS="2") as daemon:
        daemon.wait_loaded(DEMO_MODEL)
        status, answer = daemon.chat(DEMO_ALIAS, question, max_tokens=32)
        assert status == 200, answer
        text = answer["choices"][0]["message"]["content"]
        assert "Paris" in text
        assert streamed_text(list(daemon.stream(DEMO_ALIAS, question, max_tokens=32))) == text

        def ask(number: int) -> str:
            prompt = question if number == 7 else f"Tell me about the number {number}."
            return str(
                daemon.chat(DEMO_ALIAS, prompt, max_tokens=32)[1]["choices"][0]["message"][
                    "content"
                ]
            )

        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(ask, range(16)))[7] == text


def test_demo_follows_a_schema_and_calls_a_forced_tool(tmp_path: Path) -> None:
    """With a template that renders tools, as its own does not, a call comes back."""
    tool = {"type": "function", "function": {"name": "look_up", "parameters": CAPITAL}}
    store, cancel = Store(), threading.Event()
    files = resolve(DEMO_MODEL, None, store, cache_dir(store), lambda *told: None, cancel)
    folder = tmp_path / "with-tools"
    folder.mkdir()
    (folder / "model.gguf").symlink_to(files.weights[0])
    (folder / "chat_template.jinja").write_text(THINKING_WITH_TOOLS)
    with Daemon(tmp_path, "--model", str(folder), CORTEXD_ENGINE__NUM_THREADS="2") as daemon:
        daemon.wait_loaded(str(folder))
        question = "What is the capital of France? Answer in JSON."
        fields = {"max_tokens": 120, "tools": [tool], "tool_choice": "required"}
        status, answer = daemon.chat(str(folder), question, **fields)
        assert status == 200, answer
        for call in answer["choices"][0]["message"]["tool_calls"]:
            assert call["function"]["name"] == "look_up"
            jsonschema.validate(json.loads(call["function"]["arguments"]), CAPITAL)
        status, answer = daemon.chat(str(folder), question, guided_json=CAPITAL, max_tokens=60)
        assert json.loads(answer["choices"][0]["message"]["content"])["city"] == "Paris"
