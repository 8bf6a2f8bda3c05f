"""The loader end to end: what was written into a file is what the layers hold, exactly."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import profile

from cortexd.errors import BadModelFile, UnsupportedArchitecture
from cortexd.models import ModelFiles, ModelSpec, RopeSpec
from engine.layers.linear import Linear
from engine.loading.loader import Weights
from engine.models.registry import REGISTRY, load_class
from engine.preflight import inspect
from tests.engine.model_files import random_blocks, random_dense, write_gguf, write_safetensors

Q = gguf.GGMLQuantizationType
SPEC = ModelSpec(
    model_type="llama",
    architecture="LlamaForCausalLM",
    vocab_size=96,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    rms_norm_eps=1e-5,
    max_position_embeddings=128,
    rope=RopeSpec(theta=50000.0),
)
TIED = msgspec.structs.replace(SPEC, tie_word_embeddings=True)
QWEN3 = msgspec.structs.replace(SPEC, model_type="qwen3", architecture="Qwen3ForCausalLM")
BIASED = msgspec.structs.replace(SPEC, attention_bias=True, mlp_bias=True)
EMBEDDING = "model.embed_tokens.weight"


def _matrix(layer: Linear, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the whole weight a bias-free layer multiplies with, by asking for all unit vectors."""
    return layer(torch.eye(layer.in_features, dtype=dtype)).T


def _load_all(weights: Weights, spec: ModelSpec) -> dict[str, Tensor]:
    """Take every planned tensor through the public interface, as float matrices."""
    loaded: dict[str, Tensor] = {}
    for name, shape in REGISTRY[spec.model_type].plan(spec).required.items():
        if name == EMBEDDING:
            loaded[name] = weights.embedding(name, *shape)(torch.arange(shape[0]))
        elif len(shape) == 1:
            loaded[name] = weights.vector(name, *shape)
        else:
            loaded[name] = _matrix(weights.linear(name, *shape), weights.dtype)
    weights.check_all_used()
    return loaded


def _mixed_blocks(spec: ModelSpec) -> dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]:
    """Return random stored tensors of all kinds: quantised, F16, BF16 and F32."""
    rng = np.random.default_rng(0)
    kinds = [Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q8_0, Q.Q4_K, Q.Q6_K, Q.Q2_K, Q.Q3_K, Q.Q5_K, Q.F16, Q.BF16]
    stored = {}
    for number, (name, shape) in enumerate(REGISTRY[spec.model_type].plan(spec).required.items()):
        kind = Q.F32 if len(shape) == 1 else kinds[number % len(kinds)]
        if kind in (Q.F32, Q.F16, Q.BF16):
            array = gguf.quants.quantize(rng.standard_normal(shape).astype(np.float32), kind)
        else:
            array = random_blocks(rng, kind, *shape)
        stored[name] = (array, kind)
    return stored


@pytest.mark.parametrize(
    "spec", [SPEC, TIED, QWEN3, BIASED], ids=["llama", "tied", "qwen3", "bias"]
)
def test_gguf_layers_hold_what_was_written(spec: ModelSpec, tmp_path: Path) -> None:
    """Every canonical tensor equals the written one, dequantised; llama's q/k rows included."""
    stored = _mixed_blocks(spec)
    files = write_gguf(tmp_path / "m.gguf", spec, stored)
    found = inspect(files)
    loaded = _load_all(Weights.open(files, found, backend="reference"), found)
    assert loaded.keys() == stored.keys()
    for name, (array, kind) in stored.items():
        expected = torch.from_numpy(gguf.quants.dequantize(array, kind).copy())
        assert torch.equal(loaded[name], expected), name


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("stored_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_safetensors_layers_hold_what_was_written(
    stored_dtype: torch.dtype, num_shards: int, tmp_path: Path
) -> None:
    """All stored dtypes, single and sharded, under float32 computing."""
    tensors = {name: tensor.to(stored_dtype) for name, tensor in random_dense(QWEN3).items()}
    files = write_safetensors(tmp_path, QWEN3, tensors, num_shards)
    loaded = _load_all(Weights.open(files, inspect(files)), QWEN3)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor.float()), name


def test_safetensors_convert_to_the_compute_dtype(tmp_path: Path) -> None:
    """Layers answer in the compute dtype; values are rounded once."""
    tensors = random_dense(SPEC)
    files = write_safetensors(tmp_path, SPEC, tensors)
    weights = Weights.open(files, SPEC, dtype=torch.bfloat16)
    loaded = _load_all(weights, SPEC)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == torch.bfloat16
        assert torch.equal(loaded[name], tensor.bfloat16()), name


def test_quantised_weights_stay_quantised_in_memory(tmp_path: Path) -> None:
    """The bytes held are the bytes stored (the few float vectors aside)."""
    rng = np.random.default_rng(1)
    quantised = {}
    for name, (array, kind) in _mixed_blocks(SPEC).items():
        if kind in (Q.F16, Q.BF16):
            quantised[name] = (random_blocks(rng, Q.Q4_0, *_shape(name)), Q.Q4_0)
        else:
            quantised[name] = (array, kind)
    files = write_gguf(tmp_path / "m.gguf", SPEC, quantised)
    weights = Weights.open(files, inspect(files), backend="reference")
    _load_all(weights, SPEC)
    assert weights.memory_bytes == sum(array.nbytes for array, _ in quantised.values())
    assert weights.memory_bytes == weights.total_bytes


@pytest.mark.parametrize("spec", [QWEN3, SPEC], ids=["qwen3", "llama"])
@pytest.mark.parametrize("kind", ["bfloat16", "Q8_0"])
def test_loading_packs_from_the_file_without_copying_a_matrix(
    kind: str, spec: ModelSpec, tmp_path: Path
) -> None:
    """Merged and reordered ones too: beside packed weights, memory is taken for vectors only."""
    if kind == "Q8_0":
        rng = np.random.default_rng(2)
        plan = REGISTRY[spec.model_type].plan(spec).required
        blocks = {
            name: (random_blocks(rng, Q.Q8_0, *shape), Q.Q8_0)
            if len(shape) == 2
            else (np.ones(shape, np.float32), Q.F32)
            for name, shape in plan.items()
        }
        files = write_gguf(tmp_path / "m.gguf", spec, blocks)
    else:
        tensors = {name: tensor.bfloat16() for name, tensor in random_dense(spec).items()}
        files = write_safetensors(tmp_path, spec, tensors)
    found = inspect(files)
    weights = Weights.open(files, found)
    with profile(profile_memory=True) as profiled:
        model = load_class(found.model_type)(found, weights)
    assert model.backend_name == "native"
    largest = max(taken.cpu_memory_usage for taken in profiled.key_averages())
    one_matrix = weights.total_bytes // (7 * found.num_hidden_layers + 2)
    assert largest < one_matrix // 2, profiled.key_averages().table(sort_by="cpu_memory_usage")


def _shape(name: str) -> tuple[int, int]:
    rows, columns = REGISTRY[SPEC.model_type].plan(SPEC).required[name]
    return rows, columns


def test_layers_survive_the_files(tmp_path: Path) -> None:
    """After close and deletion every layer still computes, the mapped embedding included."""
    for backend in ("reference", "auto"):
        files = write_gguf(tmp_path / "m.gguf", TIED, _mixed_blocks(TIED))
        weights = Weights.open(files, inspect(files), backend=backend)  # type: ignore[arg-type]
        embedding = weights.embedding(EMBEDDING, TIED.vocab_size, TIED.hidden_size)
        head = weights.head(embedding)
        ids = torch.tensor([1, 5])
        before = embedding(ids), head(torch.ones(1, TIED.hidden_size))
        weights.close()
        Path(files.weights[0]).unlink()
        assert torch.equal(embedding(ids), before[0])
        assert torch.equal(head(torch.ones(1, TIED.hidden_size)), before[1])


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("spec", [SPEC, TIED], ids=["untied", "tied"])
def test_head_multiplies_by_the_right_matrix(spec: ModelSpec, backend: str, tmp_path: Path) -> None:
    """The head is lm_head, or the embedding when tied, in either backend."""
    rng = np.random.default_rng(0)
    stored = _mixed_blocks(spec)
    for name in (EMBEDDING, "lm_head.weight"):
        if name in stored:
            stored[name] = (random_blocks(rng, Q.Q8_0, 96, 256), Q.Q8_0)
    files = write_gguf(tmp_path / "m.gguf", spec, stored)
    weights = Weights.open(files, inspect(files), backend=backend)  # type: ignore[arg-type]
    head = weights.head(weights.embedding(EMBEDDING, 96, 256))
    source = stored[EMBEDDING if spec is TIED else "lm_head.weight"][0]
    expected = torch.from_numpy(gguf.quants.dequantize(source, Q.Q8_0).copy())
    x = torch.randn(3, 256)
    logits = x @ expected.T
    torch.testing.assert_close(head(x), logits, rtol=0, atol=0.02 * logits.abs().max().item())


@pytest.mark.parametrize("same_type", [True, False])
def test_merged_linear_is_its_parts_side_by_side(same_type: bool, tmp_path: Path) -> None:
    """Fused q, k, v equal the three products, for one stored type and for several."""
    stored = _mixed_blocks(BIASED)
    rng = np.random.default_rng(2)
    prefix = "model.layers.0.self_attn."
    rows = [256, 128, 128]
    for letter, num_rows, kind in zip("qkv", rows, (Q.Q4_0, Q.Q4_0, Q.Q8_0), strict=True):
        used = Q.Q4_0 if same_type else kind
        stored[f"{prefix}{letter}_proj.weight"] = (random_blocks(rng, used, num_rows, 256), used)
    files = write_gguf(tmp_path / "m.gguf", BIASED, stored)
    spec = inspect(files)
    weights = Weights.open(files, spec, backend="reference")
    names = [f"{prefix}{letter}_proj.weight" for letter in "qkv"]
    biases = [f"{prefix}{letter}_proj.bias" for letter in "qkv"]
    merged = weights.merged_linear(names, rows, 256, biases)
    single = Weights.open(files, spec, backend="reference")
    parts = [
        single.linear(name, num_rows, 256, bias)
        for name, num_rows, bias in zip(names, rows, biases, strict=True)
    ]
    x = torch.randn(3, 256)
    expected = torch.cat([part(x) for part in parts], dim=-1)
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-4)
    assert repr(merged).count("Product") == (1 if same_type else 3)


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    """The callback rises to the total and ends there."""
    files = write_safetensors(tmp_path, SPEC, random_dense(SPEC))
    calls: list[tuple[int, int]] = []
    weights = Weights.open(files, SPEC, progress=lambda done, total: calls.append((done, total)))
    assert calls == []
    _load_all(weights, SPEC)
    assert calls == sorted(calls)
    assert calls[-1] == (weights.total_bytes, weights.total_bytes)


def test_rope_factors_are_exposed(tmp_path: Path) -> None:
    """llama3 factors of a GGUF reach the model; without them there are none."""
    stored = _mixed_blocks(SPEC)
    plain = write_gguf(tmp_path / "plain.gguf", SPEC, stored)
    assert Weights.open(plain, SPEC).rope_factors() is None
    factors = np.linspace(1, 8, 32, dtype=np.float32)
    files = write_gguf(tmp_path / "m.gguf", SPEC, {**stored, "rope_freqs.weight": (factors, Q.F32)})
    loaded = Weights.open(files, inspect(files)).rope_factors()
    assert loaded is not None
    assert torch.equal(loaded, torch.from_numpy(factors))
    factors[3] = 0
    bad = write_gguf(tmp_path / "b.gguf", SPEC, {**stored, "rope_freqs.weight": (factors, Q.F32)})
    with pytest.raises(BadModelFile, match=r"rope_freqs\.weight must be positive"):
        Weights.open(bad, SPEC).rope_factors()


def test_plan_missing_and_unexpected_are_listed_up_to_ten(tmp_path: Path) -> None:
    """One error names what is missing and what is too much."""
    tensors = random_dense(SPEC)
    del tensors["model.norm.weight"]
    tensors.update({f"extra.{i:02}": torch.zeros(1) for i in range(12)})
    files = write_safetensors(tmp_path, SPEC, tensors)
    with pytest.raises(BadModelFile) as caught:
        Weights.open(files, SPEC)
    text = str(caught.value)
    assert "1 tensor (model.norm.weight) missing" in text
    assert "12 tensors (extra.00" in text
    assert "extra.09 and 2 more) unexpected" in text
    assert "extra.10" not in text


def test_plan_leftovers_are_skipped(tmp_path: Path) -> None:
    """Saved inv_freq buffers and the head of a tied model do no harm."""
    tensors = random_dense(TIED)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    tensors["lm_head.weight"] = torch.zeros(96, 256)
    _load_all(Weights.open(write_safetensors(tmp_path, TIED, tensors), TIED), TIED)


def test_plan_wrong_shape_is_named_with_both(tmp_path: Path) -> None:
    """A matrix of another size is refused with its own and the expected shape."""
    tensors = random_dense(SPEC)
    tensors["lm_head.weight"] = torch.zeros(95, 256)
    files = write_safetensors(tmp_path, SPEC, tensors)
    with pytest.raises(BadModelFile, match=r"lm_head\.weight is \[95, 256\], not \[96, 256\]"):
        inspect(files)


def test_plan_unsupported_types_are_refused_by_name(tmp_path: Path) -> None:
    """A tensor type that cannot run is named with its tensor, for both formats."""
    stored = _mixed_blocks(SPEC)
    name = "model.layers.1.mlp.down_proj.weight"
    stored[name] = (random_blocks(np.random.default_rng(0), Q.IQ2_XS, 256, 512), Q.IQ2_XS)
    files = write_gguf(tmp_path / "m.gguf", SPEC, stored)
    with pytest.raises(UnsupportedArchitecture, match=r"blk\.1\.ffn_down\.weight \(IQ2_XS\)"):
        inspect(files)
    tensors = random_dense(SPEC)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    files = write_safetensors(tmp_path, SPEC, tensors)
    with pytest.raises(UnsupportedArchitecture, match=r"down_proj\.weight \(F8_E4M3\)"):
        inspect(files)


def _sharded(folder: Path) -> ModelFiles:
    return write_safetensors(folder, SPEC, random_dense(SPEC), 3)


def test_index_missing_shard_is_named(tmp_path: Path) -> None:
    """A shard that the index names and that is not there is called by name."""
    files = _sharded(tmp_path)
    partial = msgspec.structs.replace(files, weights=files.weights[:2])
    with pytest.raises(BadModelFile, match=r"1 shard \(model-00003-of-00003\.safetensors\)"):
        inspect(partial)
    Path(files.weights[2]).unlink()
    with pytest.raises(BadModelFile, match=r"model-00003-of-00003\.safetensors: cannot be opened"):
        inspect(files)


def test_index_naming_absent_tensor_is_refused(tmp_path: Path) -> None:
    """A tensor that is not in the shard the index gives is called by name."""
    files = _sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(document))
    with pytest.raises(BadModelFile, match=r"ghost \(in model-00001-of-00003\.safetensors\)"):
        inspect(files)


def test_duplicate_tensor_across_shards_is_refused(tmp_path: Path) -> None:
    """The same name in two shards names both files."""
    tensors = random_dense(SPEC)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = write_safetensors(tmp_path / "a", SPEC, tensors)
    second = write_safetensors(tmp_path / "b", SPEC, tensors)
    files = msgspec.structs.replace(first, weights=first.weights + second.weights)
    with pytest.raises(BadModelFile, match="is also in"):
        inspect(files)


def test_truncated_weights_are_refused_before_loading(tmp_path: Path) -> None:
    """A file cut short fails the pre-flight check, in both formats."""
    gguf_files = write_gguf(tmp_path / "m.gguf", SPEC, _mixed_blocks(SPEC))
    for files in (gguf_files, write_safetensors(tmp_path, SPEC, random_dense(SPEC))):
        path = Path(files.weights[0])
        path.write_bytes(path.read_bytes()[:-4096])
        with pytest.raises(BadModelFile, match="truncated"):
            inspect(files)


def test_odd_safetensors_header_length_is_loaded(tmp_path: Path) -> None:
    """Data that is not aligned to its dtype, which the format allows, is read right."""
    tensors = random_dense(SPEC)
    files = write_safetensors(tmp_path, SPEC, tensors)
    path = Path(files.weights[0])
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    path.write_bytes(
        (length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :]
    )
    loaded = _load_all(Weights.open(files, inspect(files)), SPEC)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.gpu
def test_layers_on_cuda_hold_what_was_written(tmp_path: Path) -> None:
    """Quantised and dense tensors reach the device unchanged."""
    stored = _mixed_blocks(SPEC)
    files = write_gguf(tmp_path / "m.gguf", SPEC, stored)
    weights = Weights.open(files, inspect(files), device="cuda")
    for name, (array, kind) in stored.items():
        expected = torch.from_numpy(gguf.quants.dequantize(array, kind).copy())
        if name == EMBEDDING:
            ids = torch.arange(96, device="cuda")
            assert torch.equal(weights.embedding(name, 96, 256)(ids).cpu(), expected)
        elif expected.dim() == 1:
            assert torch.equal(weights.vector(name, len(expected)).cpu(), expected)
        else:
            layer = weights.linear(name, *expected.shape)
            assert torch.equal(layer(torch.eye(expected.shape[1], device="cuda")).T.cpu(), expected)
