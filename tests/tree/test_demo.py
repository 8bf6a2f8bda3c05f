"""The demo model itself: fetched from the package index, quantised, talking."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cortexd.demo import DEMO_ALIAS, DEMO_MODEL
from tests.tree.daemon import Daemon, streamed_text

pytestmark = [pytest.mark.tree, pytest.mark.slow]


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
