"""A llama from GGUF against transformers with the same, dequantised, weights."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from cortexd.models import ModelFiles
from tests.engine.checkpoints import (
    VOCAB_SIZE,
    Oracle,
    load_engine,
    make_oracle,
    oracle_greedy,
    oracle_logits,
    random_prompt,
)
from tests.engine.doubles import make_submit
from tests.engine.driving import generate, max_difference, record

HIDDEN_SIZE = 96  # three blocks of 32
NUM_HEADS, NUM_KV_HEADS = 6, 2
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    """Return the GGUF name of a transformers parameter."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, _, layer, *rest, suffix = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(rest)]}.{suffix}"


def to_interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder a q or k projection's rows as llama GGUF files hold them."""
    halves = weight.reshape(num_heads, 2, -1, weight.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def write_gguf(model: Oracle, path: Path, kind: Type, factors: Tensor | None = None) -> ModelFiles:
    """Write the model's weights as `kind`, and put their rounded values into the model."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // NUM_HEADS)
    writer.add_vocab_size(VOCAB_SIZE)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{index}" for index in range(VOCAB_SIZE)])
    writer.add_eos_token_id(VOCAB_SIZE - 1)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2
        values = parameter.detach().numpy()
        if is_matrix:
            packed = gguf.quants.quantize(values, kind)
            values = gguf.quants.dequantize(packed, kind)
            parameter.data = torch.from_numpy(values.copy())
        if "q_proj" in name or "k_proj" in name:
            values = to_interleaved(values, NUM_HEADS if "q_proj" in name else NUM_KV_HEADS)
        stored = gguf.quants.quantize(values, kind) if is_matrix else values
        writer.add_tensor(gguf_name(name), stored, raw_dtype=kind if is_matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelFiles(
        model_id="test/gguf",
        source="path",
        revision="local",
        format="gguf",
        weights=(str(path),),
    )


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("kind", [Type.F32, Type.BF16, Type.Q8_0, Type.Q4_1])
def test_gguf_equals_transformers_with_the_same_weights(
    kind: Type, is_tied: bool, tmp_path: Path
) -> None:
    """Rope rows are un-permuted, blocks decoded, and the tied head found."""
    oracle = make_oracle(
        "llama",
        seed=int(kind),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=64,
        tie_word_embeddings=is_tied,
    )
    engine = load_engine(write_gguf(oracle, tmp_path / "m.gguf", kind), backend="reference")
    assert (engine.dtype_name, engine.backend_name) == ("float32", "reference")
    recorder = record(engine)
    for length in (1, 40, 70):
        prompt = random_prompt(length)
        recorder.logits.clear()
        tokens = generate(engine, prompt, max_tokens=5, ignore_eos=True)
        assert max_difference(recorder.logits[0], oracle_logits(oracle, prompt)) < 1e-4
        assert tokens == oracle_greedy(oracle, prompt, 5)


def test_gguf_rope_factors_divide_the_frequencies(tmp_path: Path) -> None:
    """The llama3 scaling of GGUF files equals transformers' own."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    fields = {"hidden_size": HIDDEN_SIZE, "intermediate_size": 64, "seed": 30}
    oracle = make_oracle("llama", rope_parameters=scaling, **fields)
    plain = make_oracle("llama", **fields)
    scaled = oracle.model.rotary_emb.inv_freq
    factors = plain.model.rotary_emb.inv_freq / scaled
    assert float(factors.max()) > 7
    engine = load_engine(write_gguf(oracle, tmp_path / "m.gguf", Type.F32, factors))
    prompt = random_prompt(50)
    recorder = record(engine)
    generate(engine, prompt, max_tokens=1)
    assert max_difference(recorder.logits[0], oracle_logits(oracle, prompt)) < 1e-4


@pytest.mark.parametrize(("backend", "tolerance"), [("exact", 1e-3), ("auto", 0.15)])
def test_native_kernels_stay_near_the_reference_and_are_batch_invariant(
    backend: str, tolerance: float, tmp_path: Path
) -> None:
    """The fast backend computes what the reference does, with the same bits in any batch."""
    oracle = make_oracle("llama", seed=31, hidden_size=HIDDEN_SIZE, intermediate_size=64)
    files = write_gguf(oracle, tmp_path / "m.gguf", Type.Q8_0)
    prompts = [random_prompt(length, seed=length) for length in (5, 20, 31)]
    alone: list[Tensor] = []
    for prompt in prompts:
        engine = load_engine(files, backend=backend)
        recorder = record(engine)
        generate(engine, prompt, max_tokens=3, ignore_eos=True)
        alone.append(torch.stack(recorder.logits))
        expected = oracle_logits(oracle, prompt)
        assert max_difference(recorder.logits[0], expected) < tolerance * float(expected.std())
    engine = load_engine(files, backend=backend)
    recorder = record(engine)
    for index, prompt in enumerate(prompts):
        engine.submit("f", make_submit(prompt, sequence_id=index, max_tokens=3, ignore_eos=True))
    while engine.has_work:
        engine.step()
    together = torch.stack(recorder.logits).view(3, 3, -1).transpose(0, 1)
    # Without a compiler the reference runs, whose products round differently for each batch size.
    difference = 0.0 if engine.backend_name == "native" else 1e-4
    for index in range(3):
        assert max_difference(together[index], alone[index]) <= difference


def test_native_prompt_in_chunks_has_the_bits_of_one_pass(tmp_path: Path) -> None:
    """However a prompt is cut, and whichever path computed a position, logits are the same."""
    oracle = make_oracle("llama", seed=32, hidden_size=HIDDEN_SIZE, intermediate_size=64)
    files = write_gguf(oracle, tmp_path / "m.gguf", Type.Q8_0)
    prompt = random_prompt(60)
    seen: list[Tensor] = []
    for chunk in (16, 33, 64):
        engine = load_engine(files, max_prefill_chunk=chunk, prefix_cache=False)
        recorder = record(engine)
        tokens = generate(engine, prompt, max_tokens=4, ignore_eos=True)
        seen.append(torch.stack(recorder.logits))
    # The last generated token decoded beside prefilled ones: prefill all of it once more.
    recorder.logits.clear()
    generate(engine, prompt + tokens[:3], max_tokens=1, ignore_eos=True)
    tolerance = 0.0 if engine.backend_name == "native" else 1e-4
    for logits in seen:
        assert max_difference(logits, seen[-1]) <= tolerance
    assert max_difference(recorder.logits[0], seen[-1][3]) <= tolerance
