"""The whole-step call against the same step made of separate operations, and against itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from engine.kernels import cpu
from engine.kernels.cpu import (
    AttentionRow,
    NativeAttention,
    NativeBatch,
    NativeDecoder,
    NativeExperts,
    NativeLayer,
    NativeMLP,
    NativeShape,
    PackedLinear,
)
from tests.engine.kernels.quantized import random_rows

HIDDEN, INTERMEDIATE, VOCABULARY, NUM_LAYERS = 64, 96, 50, 3
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, NUM_BLOCKS = 6, 2, 32, 8, 96
ROTARY = cpu.Rotary(10000.0 ** -(torch.arange(HEAD_DIM // 2) * 2 / HEAD_DIM))
SHAPE = NativeShape(NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5, 1e-5, ROTARY)
EMBEDDING = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(3))


def packed(name: str, out_features: int, in_features: int, seed: int) -> PackedLinear:
    bias = torch.randn(out_features, generator=torch.Generator().manual_seed(seed)) * 0.1
    result = cpu.pack([random_rows(name, out_features, in_features, seed)], bias)
    assert result is not None
    return result


def norm(seed: int, *shape: int) -> Tensor:
    return 1 + 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_layer(index: int, has_head_norm: bool) -> NativeLayer:
    seed = index * 10
    attended, kv_size = NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM
    return NativeLayer(
        input_norm=norm(seed, HIDDEN),
        mixer=NativeAttention(
            qkv=[  # three types, as mixed GGUF files have them
                packed("Q4_1", attended, HIDDEN, seed + 1),
                packed("Q4_0", kv_size, HIDDEN, seed + 2),
                packed("Q8_0", kv_size, HIDDEN, seed + 3),
            ],
            head_norm=norm(seed, NUM_HEADS + NUM_KV_HEADS, HEAD_DIM) if has_head_norm else None,
            output=[packed("Q4_1", HIDDEN, attended, seed + 4)],
        ),
        mlp_norm=norm(seed + 1, HIDDEN),
        feed_forward=NativeMLP(
            gate_up=[packed("Q4_1", 2 * INTERMEDIATE, HIDDEN, seed + 5)],
            down=[packed("Q5_0", HIDDEN, INTERMEDIATE, seed + 6)],
        ),
    )


@dataclass
class Model:
    """A small model, and its steps both ways."""

    layers: list[NativeLayer]
    final_norm: Tensor
    head: list[PackedLinear]
    native: NativeDecoder

    def separate(self, hidden: Tensor, batch: NativeBatch, cache: Tensor) -> Tensor:
        """Compute what `native.step` does with one call per operation."""
        for layer, cache_layer in zip(self.layers, cache, strict=True):
            mixer, mlp = layer.mixer, layer.feed_forward
            assert isinstance(mixer, NativeAttention)
            assert isinstance(mlp, NativeMLP)
            x = cpu.rms_norm(hidden, layer.input_norm, SHAPE.norm_eps)
            qkv = torch.cat([cpu.linear(part, x) for part in mixer.qkv], 1)
            heads = qkv.view(len(hidden), -1, HEAD_DIM)
            cpu.rope_and_kv_write(
                heads, batch.positions, batch.slots, cache_layer, ROTARY,
                head_norm=mixer.head_norm, eps=SHAPE.norm_eps,
            )  # fmt: skip
            out = cpu.paged_attention(heads[:, :NUM_HEADS], cache_layer, batch.rows, SHAPE.scale)
            hidden += cpu.linear(mixer.output[0], out)
            x = cpu.rms_norm(hidden, layer.mlp_norm, SHAPE.norm_eps)
            hidden += cpu.linear(mlp.down[0], cpu.silu_mul(cpu.linear(mlp.gate_up[0], x)))
        x = cpu.rms_norm(hidden[batch.logit_rows], self.final_norm, SHAPE.norm_eps)
        return cpu.linear(self.head[0], x)


@pytest.fixture(params=[False, True], ids=["llama", "qwen3"], scope="module")
def model(request: pytest.FixtureRequest) -> Model:
    layers = [make_layer(index, request.param) for index in range(NUM_LAYERS)]
    final_norm, head = norm(99, HIDDEN), [packed("Q8_0", VOCABULARY, HIDDEN, 98)]
    return Model(layers, final_norm, head, NativeDecoder(SHAPE, layers, final_norm, head))


@dataclass
class Sequence:
    """Tokens, and the blocks of one sequence in the shared cache."""

    tokens: Tensor
    block_ids: Tensor


def make_cache() -> Tensor:
    # What nobody has written must never be read.
    shape = (NUM_LAYERS, NUM_BLOCKS, BLOCK_SIZE, 2 * NUM_KV_HEADS, HEAD_DIM)
    return torch.full(shape, torch.nan)


def make_sequences(lengths: list[int]) -> list[Sequence]:
    generator = torch.Generator().manual_seed(1)
    blocks_of = [-(-length // BLOCK_SIZE) for length in lengths]
    order = torch.randperm(NUM_BLOCKS, generator=generator)[: sum(blocks_of)]
    return [
        Sequence(torch.randint(VOCABULARY, (length,), generator=generator), ids.contiguous())
        for length, ids in zip(lengths, order.split(blocks_of), strict=True)
    ]


def step_inputs(chunks: list[tuple[Sequence, int, int]]) -> tuple[Tensor, NativeBatch]:
    """Return embeddings and batch over tokens begin..end-1 of each sequence; logits for all."""
    positions = torch.cat([torch.arange(begin, end) for _, begin, end in chunks])
    slots, rows, start = [], [], 0
    for sequence, begin, end in chunks:
        seen = torch.arange(begin, end)
        slots.append(sequence.block_ids[seen // BLOCK_SIZE] * BLOCK_SIZE + seen % BLOCK_SIZE)
        row = AttentionRow(start, start + end - begin, end, block_ids=sequence.block_ids)
        rows.append(row)
        start += end - begin
    ids = torch.cat([sequence.tokens[begin:end] for sequence, begin, end in chunks])
    batch = NativeBatch(positions, torch.cat(slots), rows, torch.arange(start))
    return EMBEDDING[ids], batch


def test_step_has_the_bits_of_separate_operations(model: Model, isa: str) -> None:
    first, second = make_sequences([21, 30])
    chunks = [[(first, 0, 20), (second, 0, 11)], [(first, 20, 21), (second, 11, 30)]]
    native_cache, separate_cache = make_cache(), make_cache()
    for chunk in chunks:
        native = model.native.step(*step_inputs(chunk), native_cache)
        separate = model.separate(*step_inputs(chunk), separate_cache)
        assert native.isfinite().all()
        assert torch.equal(native, separate)
    assert torch.equal(native_cache.nan_to_num(7.0), separate_cache.nan_to_num(7.0))


def test_step_logits_are_the_same_alone_among_sixteen_and_chunk_by_chunk(
    model: Model, isa: str
) -> None:
    sequences = make_sequences([25, *range(3, 19)])
    mine = sequences[0]
    whole = model.native.step(*step_inputs([(mine, 0, 25)]), make_cache())

    cache = make_cache()
    tokens = [
        model.native.step(*step_inputs([(mine, i, i + 1)]), cache) for i in range(len(mine.tokens))
    ]
    assert torch.equal(torch.cat(tokens), whole)

    cache = make_cache()
    prefills = [(s, 0, len(s.tokens) - 1) for s in sequences]
    decodes = [(s, len(s.tokens) - 1, len(s.tokens)) for s in sequences]
    prefilled = model.native.step(*step_inputs(prefills), cache)
    decoded = model.native.step(*step_inputs(decodes), cache)
    assert torch.equal(torch.cat([prefilled[:24], decoded[:1]]), whole)


def test_step_of_a_long_prompt_has_the_bits_of_short_ones_with_experts(isa: str) -> None:
    # K-quants take another path for many tokens; an expert gets any few of them.
    size = 256
    experts = [
        NativeMLP([packed("Q4_K", 2 * size, size, 10 + i)], [packed("Q6_K", size, size, 20 + i)])
        for i in range(3)
    ]
    layer = NativeLayer(
        input_norm=norm(1, size),
        mixer=NativeAttention(
            qkv=[packed("Q5_K", (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM, size, 2)],
            head_norm=None,
            output=[packed("Q8_0", size, NUM_HEADS * HEAD_DIM, 3)],
        ),
        mlp_norm=norm(4, size),
        feed_forward=NativeExperts([packed("Q8_0", 3, size, 5)], experts, None, 2, True),
    )
    native = NativeDecoder(SHAPE, [layer], norm(6, size), [packed("Q8_0", VOCABULARY, size, 7)])
    sequence = make_sequences([200])[0]
    embedding = torch.randn(VOCABULARY, size, generator=torch.Generator().manual_seed(8))

    def logits(chunk: int) -> Tensor:
        cache = make_cache()[:1]
        parts = []
        for begin in range(0, 200, chunk):
            _, batch = step_inputs([(sequence, begin, begin + chunk)])
            hidden = embedding[sequence.tokens[begin : begin + chunk]]
            parts.append(native.step(hidden, batch, cache))
        return torch.cat(parts)

    whole = logits(200)
    assert whole.isfinite().all()
    assert torch.equal(whole, logits(40))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_step_does_not_depend_on_threads(model: Model, num_threads: int) -> None:
    chunks = [(sequence, 0, len(sequence.tokens)) for sequence in make_sequences([300, 40])]
    two = model.native.step(*step_inputs(chunks), make_cache())
    cpu.set_num_threads(num_threads)
    assert torch.equal(model.native.step(*step_inputs(chunks), make_cache()), two)


def test_step_returns_the_wanted_rows_only(model: Model) -> None:
    chunk = [(make_sequences([12])[0], 0, 12)]
    every = model.native.step(*step_inputs(chunk), make_cache())
    for wanted in ([11, 3], []):
        hidden, batch = step_inputs(chunk)
        batch = replace(batch, logit_rows=torch.tensor(wanted, dtype=torch.int64))
        some = model.native.step(hidden, batch, make_cache())
        assert torch.equal(some, every[wanted])


def test_step_poisoned_sequence_stays_alone(model: Model) -> None:
    chunks = [(sequence, 0, len(sequence.tokens)) for sequence in make_sequences([5, 6])]
    clean = model.native.step(*step_inputs(chunks), make_cache())
    hidden, batch = step_inputs(chunks)
    hidden[2, 7] = torch.nan
    logits = model.native.step(hidden, batch, make_cache())
    assert logits[2:5].isnan().all()
    others = [0, 1, *range(5, 11)]
    assert torch.equal(logits[others], clean[others])


@pytest.mark.parametrize("wrong", ["slot", "block", "logit row"])
def test_step_refuses_indices_outside_its_tensors(model: Model, wrong: str) -> None:
    hidden, batch = step_inputs([(make_sequences([9])[0], 0, 9)])
    if wrong == "slot":
        batch.slots[3] = NUM_BLOCKS * BLOCK_SIZE
    elif wrong == "block":
        row = AttentionRow(0, 9, 9, block_ids=torch.tensor([0, NUM_BLOCKS]))
        batch = replace(batch, rows=[row])
    else:
        batch.logit_rows[0] = 9
    with pytest.raises(AssertionError, match="out of range"):
        model.native.step(hidden, batch, make_cache())
