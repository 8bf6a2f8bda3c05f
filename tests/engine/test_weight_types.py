"""A whole model of every weight type: what transformers computes with the gguf package's values.

Types that the package cannot make (K-quants, IQ4) are random valid blocks. What is quantised in the
file stays so in memory, and what cannot run is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from cortexd.errors import UnsupportedArchitecture
from engine.formats.ggml import BLOCK_SIZES, DENSE_TYPES, QUANTIZED_TYPES, RUNNABLE_TYPES, GGMLType
from engine.preflight import inspect
from tests.engine.checkpoints import (
    load_engine,
    make_oracle,
    oracle_greedy,
    oracle_logits,
    random_prompt,
)
from tests.engine.driving import generate, max_difference, record
from tests.engine.llama_export import write_gguf
from tests.engine.loading.test_loader import SPEC, _mixed_blocks
from tests.engine.model_files import SCALE_OFFSETS, random_blocks
from tests.engine.model_files import write_gguf as write_planned

# The list of the mission; everything else is refused before a byte is read.
WANTED = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4", "F16", "BF16", "F32"),
)
REFUSED = (
    *("Q8_1", "Q8_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
    *("TQ1_0", "TQ2_0", "NVFP4", "Q1_0", "I8", "I16", "I32", "I64", "F64"),
)
WIDTH = 0.08  # standard deviation of a matrix's numbers
SIZES = {"hidden_size": 768, "intermediate_size": 256, "num_hidden_layers": 1}


def test_lists_are_complete() -> None:
    """Every type that the format knows either runs or is refused."""
    assert {each.name for each in RUNNABLE_TYPES} == set(WANTED)
    assert {each.name for each in GGMLType} == {*WANTED, *REFUSED}
    assert DENSE_TYPES | QUANTIZED_TYPES == RUNNABLE_TYPES


def _valid_blocks(seed: int) -> Callable[[np.ndarray, Type], np.ndarray]:
    """Return a packer that makes random blocks of the shape's size, with scales of use."""
    rng = np.random.default_rng(seed)

    def pack(values: np.ndarray, kind: Type) -> np.ndarray:
        blocks = random_blocks(rng, kind, *values.shape)
        if kind is Type.MXFP4:
            blocks[:, ::17] = rng.integers(121, 124, blocks[:, ::17].shape)  # exponents near 2**-4
            return blocks
        size = gguf.GGML_QUANT_SIZES[kind][1]
        spread = float(gguf.quants.dequantize(blocks, kind).std())
        flat = blocks.reshape(-1, size)
        for offset in SCALE_OFFSETS[kind.name]:
            scales = flat[:, offset : offset + 2].copy().view(np.float16)
            narrow = (scales.astype(np.float32) * WIDTH / spread).astype(np.float16)
            flat[:, offset : offset + 2] = narrow.view(np.uint8)
        return blocks

    return pack


@pytest.mark.parametrize("name", WANTED)
def test_model_of_this_type_equals_transformers(name: str, tmp_path: Path) -> None:
    """Logits within 1e-4, equal greedy text, and no more memory than the file takes."""
    kind = Type[name]
    is_dense = GGMLType[name] in DENSE_TYPES
    oracle = make_oracle("llama", seed=int(kind), **SIZES)
    pack = gguf.quants.quantize if is_dense else _valid_blocks(int(kind))
    files = write_gguf(oracle, tmp_path / "m.gguf", kind, pack=pack)
    engine = load_engine(files, backend="reference")
    recorder = record(engine)
    prompt = random_prompt(20)
    tokens = generate(engine, prompt, max_tokens=2, ignore_eos=True)
    expected = oracle_logits(oracle, prompt)
    assert float(expected.std()) > 0.05, "logits that say nothing"
    assert max_difference(recorder.logits[0], expected) < 1e-4
    assert tokens == oracle_greedy(oracle, prompt, tokens, 2)
    stored = sum(parameter.numel() for parameter in oracle.parameters())
    elements, size = BLOCK_SIZES[GGMLType[name]]
    # Dense numbers take the compute type on the torch path; the CPU's kernels keep those as well.
    kept = load_engine(files) if is_dense else engine
    if is_dense and kept.backend_name == "reference":
        return
    loaded = kept.memory_bytes - kept.cache.memory_bytes
    assert loaded < 1.05 * stored * size / elements + 64 * 1024  # norms stay float32


@pytest.mark.parametrize("name", REFUSED)
def test_type_that_cannot_run_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """The error has the tensor's type and those that run, and no weight is read for it."""
    elements, size = BLOCK_SIZES[GGMLType[name]]
    stored = _mixed_blocks(SPEC)
    zeros = np.zeros((256, 512 // elements * size), dtype=np.uint8)
    stored["model.layers.1.mlp.down_proj.weight"] = (zeros, Type[name])
    with pytest.raises(UnsupportedArchitecture, match=rf"ffn_down\.weight \({name}\).*Q4_K"):
        inspect(write_planned(tmp_path / "m.gguf", SPEC, stored))
