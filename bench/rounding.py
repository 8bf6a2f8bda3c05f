"""`python -m bench rounding [FILE]`: what rounded activations cost in perplexity.

The file (default: the demo model's) reads the beginning of this project's licence three times: in
plain torch, with the native kernels' exact activations and with rounded ones. What is printed of
each is the perplexity, and how often its first choice is the reference's.
"""

from __future__ import annotations

import argparse
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bench.machine import commit, cpu_name, demo_file
from cortexd.messages.inference import PromptScores, Submit
from cortexd.models import ModelFiles
from cortexd.settings import Engine as EngineSettings

_TEXT: Final = Path(__file__).resolve().parent.parent / "LICENSE"
_OWNER: Final = "bench"


def main(arguments: Sequence[str]) -> int:
    """Measure and print the table; return the exit code: 2 without the native kernels."""
    parser = argparse.ArgumentParser(prog="python -m bench rounding")
    parser.add_argument("file", nargs="?", help="a .gguf file; default: the demo model's")
    parser.add_argument("--tokens", type=int, default=2048, help="how much of the text is read")
    chosen = parser.parse_args(arguments)
    from engine.kernels import cpu as native
    from engine.text.text_model import TextModel

    if not native.available():
        print(f"there is nothing to compare: {native.status()}")
        return 2
    path = chosen.file or str(demo_file())
    files = ModelFiles(model_id="bench", source="path", revision="", format="gguf", weights=(path,))
    ids = TextModel.load(files).encode(_TEXT.read_text(), add_special_tokens=False)
    ids = ids[: chosen.tokens]
    print(f"commit {commit()}\n{cpu_name()}\n{Path(path).name}, {len(ids)} tokens\n")
    print("| activations | perplexity | first choices of the reference |\n|---|---|---|")
    reference = _scores(files, ids, backend="reference")
    for name, scores in (
        ("reference (torch)", reference),
        ("exact", _scores(files, ids, activations="exact")),
        ("rounded", _scores(files, ids, activations="rounded")),
    ):
        perplexity = math.exp(-sum(scores.logprobs) / len(scores.logprobs))
        pairs = zip(scores.top_ids, reference.top_ids, strict=True)
        equal = sum(ours[0] == theirs[0] for ours, theirs in pairs)
        print(f"| {name} | {perplexity:.3f} | {equal / len(scores.logprobs):.2%} |", flush=True)
    return 0


def _scores(files: ModelFiles, ids: list[int], **fields: Any) -> PromptScores:
    """Return what the model thinks of each token from the second on, with its first choice."""
    from engine.engine import Engine
    from engine.preflight import inspect

    settings = EngineSettings(device="cpu", dtype="float32", kv_cache_mib=512, **fields)
    engine = Engine.load(files, inspect(files), settings, lambda fraction, stage: None)
    engine.submit(
        _OWNER,
        Submit(
            request_id="bench",
            sequence_id=1,
            prompt_token_ids=struct.pack(f"<{len(ids)}i", *ids),
            max_tokens=0,
            temperature=0.0,
            num_prompt_logprobs=1,
        ),
    )
    scores = PromptScores([], [], [], [])
    while engine.has_work:
        for delta in engine.step().get(_OWNER, []):
            if delta.prompt_scores is not None:
                scores.logprobs.extend(delta.prompt_scores.logprobs)
                scores.top_ids.extend(delta.prompt_scores.top_ids)
    return scores
