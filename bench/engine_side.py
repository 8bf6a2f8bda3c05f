"""`python -m bench.engine_side FILE THREADS`: this project's engine as a side of `bench.cpu`.

Whole engine steps: scheduling, the batch's tensors, the model, the sampler.
"""

from __future__ import annotations

import struct
import sys

import torch

from bench.runner import Timed, serve
from cortexd.messages.inference import SequenceDelta, Submit
from cortexd.models import ModelFiles
from cortexd.settings import Engine as EngineSettings
from engine.engine import Engine
from engine.preflight import inspect

OWNER = "bench"


class EngineSide:
    """The engine in this process; prompts are all different, so no cache can help."""

    def __init__(self, path: str, num_threads: int) -> None:
        files = ModelFiles(
            model_id="bench", source="path", revision="", format="gguf", weights=(path,)
        )
        spec = inspect(files)
        settings = EngineSettings(num_threads=num_threads, kv_cache_mib=1024)
        self._engine = Engine.load(files, spec, settings, lambda fraction, stage: None)
        self._vocab_size = spec.vocab_size
        self._generator = torch.Generator().manual_seed(0)
        self._next_id = 0

    def prefill(self, num_tokens: int, timed: Timed) -> None:
        """Measure one prompt and its first token."""
        self._submit(num_tokens, 1)
        timed(self._finish)

    def decode(self, batch: int, num_prompt: int, num_tokens: int, timed: Timed) -> None:
        """Measure the steps after the one that gave the last sequence its first token."""
        for _ in range(batch):
            self._submit(num_prompt, batch + num_tokens)
        seen = set[int]()
        while len(seen) < batch:
            seen.update(delta.sequence_id for delta in self._step())

        def run() -> None:
            for _ in range(num_tokens):
                assert len(self._step()) == batch, "a sequence ended or waits"

        timed(run)
        self._engine.cancel_owner(OWNER)

    def _finish(self) -> None:
        while self._engine.has_work:
            self._step()

    def _step(self) -> list[SequenceDelta]:
        return list(self._engine.step().get(OWNER, []))

    def _submit(self, num_prompt: int, num_tokens: int) -> None:
        self._next_id += 1
        ids = torch.randint(self._vocab_size, (num_prompt,), generator=self._generator).tolist()
        submit = Submit(
            request_id=f"bench-{self._next_id}",
            sequence_id=self._next_id,
            prompt_token_ids=struct.pack(f"<{num_prompt}i", *ids),
            max_tokens=num_tokens,
            temperature=0.0,
            ignore_eos=True,
        )
        self._engine.submit(OWNER, submit)


def main() -> int:
    """Load the file and serve; return the exit code."""
    with torch.inference_mode():
        return serve(EngineSide(sys.argv[1], int(sys.argv[2])))


if __name__ == "__main__":
    raise SystemExit(main())
