"""Quantised files are split between blocks, or refused; dense ones are quantised part by part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import msgspec
import pytest

from cortexd.errors import InvalidValue
from cortexd.models import ModelFiles
from engine.preflight import check_tensor_parallel, inspect
from tests.engine.checkpoints import make_oracle, random_prompt
from tests.engine.driving import generate, max_difference, record
from tests.engine.gguf_export import Exporter
from tests.engine.llama_export import write_gguf
from tests.engine.tp.ranks import engine_of, saved

Type = gguf.GGMLQuantizationType
TOLERANCE = 1e-4
# Every split row is a whole number of blocks of 32 on each of two ranks.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_value_head_dim": 32,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": SIZES,
    "qwen3_moe": {**SIZES, **EXPERTS},
    "qwen3_next": {**SIZES, **EXPERTS, **LINEAR},
    "qwen3_5_text": {**SIZES, **LINEAR},
    "qwen3_5_moe_text": {**SIZES, **EXPERTS, **LINEAR},
}


def _check_two_ranks_equal_one(files: ModelFiles) -> None:
    check_tensor_parallel(files, inspect(files), 2)
    tokens, logits = [], []
    for world_size in (1, 2):
        with engine_of(files, world_size) as engine:
            recorder = record(engine)
            tokens.append(generate(engine, random_prompt(40), max_tokens=4, ignore_eos=True))
            logits.append(recorder.logits)
    assert tokens[0] == tokens[1]
    assert max(map(max_difference, *logits)) < TOLERANCE


@pytest.mark.parametrize("is_tied", [False, True])
def test_split_gguf_gives_the_whole_ones_tokens_and_logits(tmp_path: Path, is_tied: bool) -> None:
    """Rows at any row (the interleaved heads of llama included), columns between blocks."""
    fields = {"hidden_size": 192, "intermediate_size": 128, "tie_word_embeddings": is_tied}
    files = write_gguf(make_oracle("llama", **fields), tmp_path / "m.gguf", Type.Q8_0)
    _check_two_ranks_equal_one(files)


@pytest.mark.parametrize("family", FAMILIES)
def test_split_gguf_of_every_family_is_equal(family: str, tmp_path: Path) -> None:
    """Stacked experts, tiled V heads, the fused b and a of qwen3next."""
    oracle = make_oracle(family, **FAMILIES[family])
    _check_two_ranks_equal_one(Exporter(oracle, Type.Q8_0).write(tmp_path / "m.gguf"))


@pytest.mark.parametrize("quant", ["q8_0", "q4_k"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_quantised_as_the_whole_is(family: str, quant: str, tmp_path: Path) -> None:
    """Where blocks fit the parts, the same blocks hold the same numbers."""
    files = saved(tmp_path / "model", make_oracle(family, **FAMILIES[family]))
    _check_two_ranks_equal_one(msgspec.structs.replace(files, quant=quant))


def test_part_that_no_block_fits_stays_dense(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Half a row of 96 numbers is no whole number of blocks: told, and more exact."""
    files = saved(tmp_path / "model", make_oracle("qwen3", **{**SIZES, "intermediate_size": 96}))
    files = msgspec.structs.replace(files, quant="q8_0")
    with engine_of(files, 1):
        assert not [r for r in caplog.records if "kept_dense" in str(vars(r))]
    with engine_of(files, 2) as engine:
        assert [r for r in caplog.records if "down_proj" in str(vars(r))]
        assert len(generate(engine, random_prompt(20), max_tokens=3, ignore_eos=True)) == 3


def test_gguf_whose_blocks_do_not_divide_is_refused(tmp_path: Path) -> None:
    """The error names the tensor, its blocks, the allowed sizes and the way out."""
    oracle = make_oracle("llama", hidden_size=96, intermediate_size=128)
    files = write_gguf(oracle, tmp_path / "m.gguf", Type.Q8_0)
    with pytest.raises(InvalidValue) as caught:
        check_tensor_parallel(files, inspect(files), 2)
    message = caught.value.message
    assert "blk.0.attn_output.weight has rows of 96 numbers in Q8_0 blocks of 32" in message
    assert "allowed for it: 1 (or safetensors files)" in message


def test_tiled_value_heads_are_refused_where_their_runs_cut_blocks(tmp_path: Path) -> None:
    """192 columns are three blocks for each of two ranks, but each tile of one is half a block."""
    fields = {**SIZES, **LINEAR, "linear_value_head_dim": 16, "linear_num_value_heads": 12}
    oracle = make_oracle("qwen3_5_text", **fields)
    files = Exporter(oracle, Type.Q8_0).write(tmp_path / "m.gguf")
    with pytest.raises(InvalidValue, match=r"ssm_out\.weight has rows of 192 numbers"):
        check_tensor_parallel(files, inspect(files), 2)
