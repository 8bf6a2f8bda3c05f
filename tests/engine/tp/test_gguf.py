"""Quantised files are split between blocks, or refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from cortexd.errors import InvalidValue
from engine.preflight import check_tensor_parallel, inspect
from tests.engine.checkpoints import make_oracle, random_prompt
from tests.engine.driving import generate, max_difference, record
from tests.engine.llama_export import write_gguf
from tests.engine.tp.ranks import engine_of

Type = gguf.GGMLQuantizationType


@pytest.mark.parametrize("is_tied", [False, True])
def test_split_gguf_gives_the_whole_ones_tokens_and_logits(tmp_path: Path, is_tied: bool) -> None:
    """Rows at any row (the interleaved heads of llama included), columns between blocks."""
    fields = {"hidden_size": 192, "intermediate_size": 128, "tie_word_embeddings": is_tied}
    files = write_gguf(make_oracle("llama", **fields), tmp_path / "m.gguf", Type.Q8_0)
    check_tensor_parallel(files, inspect(files), 2)
    tokens, logits = [], []
    for world_size in (1, 2):
        with engine_of(files, world_size) as engine:
            recorder = record(engine)
            tokens.append(generate(engine, random_prompt(40), max_tokens=6))
            logits.append(recorder.logits)
    assert tokens[0] == tokens[1]
    assert max(map(max_difference, *logits)) < 1e-4


def test_gguf_whose_blocks_do_not_divide_is_refused(tmp_path: Path) -> None:
    """The error names the tensor, its blocks, the allowed sizes and the way out."""
    oracle = make_oracle("llama", hidden_size=96, intermediate_size=128)
    files = write_gguf(oracle, tmp_path / "m.gguf", Type.Q8_0)
    with pytest.raises(InvalidValue) as caught:
        check_tensor_parallel(files, inspect(files), 2)
    message = caught.value.message
    assert "blk.0.attn_output.weight has rows of 96 numbers in Q8_0 blocks of 32" in message
    assert "allowed for it: 1 (or safetensors files)" in message
