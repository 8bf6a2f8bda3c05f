"""The front's cache of tokenizers: read once, early when the router says so."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from actors.front.text_models import TextModels
from cortexd.errors import BadModelFile
from cortexd.models import ModelFiles
from engine.text.text_model import TextModel
from tests.waiting import DEADLINE_S

FILES = ModelFiles(model_id="m", source="path", revision="", format="gguf", weights=("/m.gguf",))


class Loader:
    """Counts its calls; the first `num_failures` fail."""

    def __init__(self, num_failures: int = 0) -> None:
        self.num_calls = 0
        self._num_failures = num_failures

    def __call__(self, files: ModelFiles) -> TextModel:
        self.num_calls += 1
        if self.num_calls <= self._num_failures:
            raise BadModelFile(f"{files.weights[0]}: broken")
        return cast(TextModel, f"{files.model_id} number {self.num_calls}")


def test_prepared_text_model_is_not_read_again() -> None:
    """The request gets what was read before it came."""

    async def work() -> None:
        loader = Loader()
        models = TextModels(loader)
        models.prepare(FILES)
        models.prepare(FILES)
        async with asyncio.timeout(DEADLINE_S):
            assert await models.get(FILES) == "m number 1"
            assert await models.get(FILES) == "m number 1"
        assert loader.num_calls == 1

    asyncio.run(work())


def test_preparation_that_failed_is_tried_again_by_the_next_request() -> None:
    """Who waits for it hears of the failure; it is not remembered."""

    async def work() -> None:
        models = TextModels(Loader(num_failures=1))
        models.prepare(FILES)
        async with asyncio.timeout(DEADLINE_S):
            with pytest.raises(BadModelFile, match="broken"):
                await models.get(FILES)
            assert await models.get(FILES) == "m number 2"

    asyncio.run(work())
