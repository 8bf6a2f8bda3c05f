"""Which part of every tensor a rank holds, and which world sizes a model can be split into.

One rule per tensor name. Matrices that make heads or intermediate features are split by rows, those
that consume them by columns (their partial sums are added up), the vocabulary by rows; the rest is
on every rank. Experts are split like any feed-forward, each over all ranks. Pure and torch-free:
the pre-flight check asks here before a process is started.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import msgspec

from cortexd.errors import InvalidValue, UnsupportedArchitecture
from cortexd.models import ModelSpec, MoeSpec
from engine.formats.checkpoint import Part
from engine.tp.linear_heads import LinearHeads

MAX_WORLD_SIZE: Final = 64
# Rows of the vocabulary are dealt out in multiples of this where that leaves no rank without any.
_VOCAB_ALIGNMENT: Final = 64
# Model types whose every tensor has a rule below.
SHARDED_MODEL_TYPES: Final = frozenset(
    {"llama", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe"}
)


class Rule(enum.Enum):
    """How one tensor is split. Rows are the last dimension but one, where there are two."""

    REPLICATED = "replicated"
    ROWS = "rows"  # contiguous, equal parts
    TWO_ROWS = "two_rows"  # of each half, a gate's and an up's
    KV_ROWS = "kv_rows"  # by KV head; one head on several ranks when there are more ranks
    COLUMNS = "columns"  # of the input; the outputs are partial sums
    VOCABULARY = "vocabulary"  # rows, the last part may be smaller
    FIRST_RANK = "first_rank"  # what is added once to a sum over all ranks
    # Of Gated DeltaNet layers, along dimension 0; see `linear_heads`.
    CHANNELS = "channels"  # q, k, v
    VALUE_HEADS = "value_heads"
    QKVZ_GROUPS = "qkvz_groups"
    BA_GROUPS = "ba_groups"
    VALUE_COLUMNS = "value_columns"  # as COLUMNS


_RULES: Final[dict[str, Rule]] = {
    "embed_tokens": Rule.VOCABULARY,
    "lm_head": Rule.VOCABULARY,
    "q_proj": Rule.ROWS,  # with a gate, the two parts of a head lie together
    "k_proj": Rule.KV_ROWS,
    "v_proj": Rule.KV_ROWS,
    "o_proj": Rule.COLUMNS,
    "gate_proj": Rule.ROWS,
    "up_proj": Rule.ROWS,
    "gate_up_proj": Rule.TWO_ROWS,
    "down_proj": Rule.COLUMNS,
    "gate": Rule.REPLICATED,  # every rank routes, and finds the same
    "shared_expert_gate": Rule.REPLICATED,
    "in_proj_qkv": Rule.CHANNELS,
    "conv1d": Rule.CHANNELS,
    "in_proj_z": Rule.VALUE_HEADS,
    "in_proj_b": Rule.VALUE_HEADS,
    "in_proj_a": Rule.VALUE_HEADS,
    "A_log": Rule.VALUE_HEADS,
    "dt_bias": Rule.VALUE_HEADS,
    "in_proj_qkvz": Rule.QKVZ_GROUPS,
    "in_proj_ba": Rule.BA_GROUPS,
    "out_proj": Rule.VALUE_COLUMNS,
    "q_norm": Rule.REPLICATED,
    "k_norm": Rule.REPLICATED,
    "norm": Rule.REPLICATED,
    "input_layernorm": Rule.REPLICATED,
    "post_attention_layernorm": Rule.REPLICATED,
}
_COLUMN_RULES: Final = frozenset({Rule.COLUMNS, Rule.VALUE_COLUMNS})


def rule_of(name: str) -> Rule:
    """Return the rule of a canonical tensor name; a bias goes with its matrix's output."""
    module, _, kind = name.rpartition(".")
    if kind not in {"weight", "bias"}:
        return _RULES[kind]
    rule = _RULES[module.rpartition(".")[2]]
    return Rule.FIRST_RANK if kind == "bias" and rule in _COLUMN_RULES else rule


def makes_partial_sums(name: str) -> bool:
    """Tell whether a rank's products with this matrix are to be added up over all ranks."""
    return rule_of(name) in _COLUMN_RULES


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's share of a model."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether this is the whole model."""
        return self.world_size == 1

    def kv_heads(self, num_kv_heads: int) -> slice:
        """Return the KV heads that this rank's query heads read."""
        if self.world_size > num_kv_heads:
            head = self.rank * num_kv_heads // self.world_size
            return slice(head, head + 1)
        return self._range(num_kv_heads)

    def vocabulary(self, vocab_size: int) -> slice:
        """Return this rank's token ids; all parts but the last have the same size."""
        part = self.vocabulary_part(vocab_size)
        begin = min(self.rank * part, vocab_size)
        return slice(begin, min(begin + part, vocab_size))

    def vocabulary_part(self, vocab_size: int) -> int:
        """Return the token ids per rank, of which only the last rank may have fewer."""
        part = -(-vocab_size // self.world_size)
        aligned = -(-part // _VOCAB_ALIGNMENT) * _VOCAB_ALIGNMENT
        return aligned if (self.world_size - 1) * aligned < vocab_size else part

    def local_spec(self, spec: ModelSpec) -> ModelSpec:
        """Return the sizes of this rank's layers; the vocabulary stays the whole one."""
        if self.is_whole:
            return spec
        heads = self.kv_heads(spec.num_key_value_heads)
        return msgspec.structs.replace(
            spec,
            num_attention_heads=spec.num_attention_heads // self.world_size,
            num_key_value_heads=heads.stop - heads.start,
            intermediate_size=spec.intermediate_size // self.world_size,
            moe=None if spec.moe is None else self._local_experts(spec.moe),
            linear_attention=(
                None if spec.linear_attention is None else self._linear_heads(spec).local_spec
            ),
        )

    def part(self, name: str, shape: tuple[int, ...], spec: ModelSpec) -> Part | None:
        """Return which part of a stored tensor this rank reads; None: all of it."""
        rule = rule_of(name)
        if self.is_whole or rule is Rule.REPLICATED:
            return None
        axis, ranges = self._axis_and_ranges(rule, shape, spec)
        return Part(axis, ranges)

    def _axis_and_ranges(
        self, rule: Rule, shape: tuple[int, ...], spec: ModelSpec
    ) -> tuple[int, tuple[slice, ...]]:
        rows, last = max(len(shape) - 2, 0), len(shape) - 1
        match rule:
            case Rule.ROWS:
                return rows, (self._range(shape[rows]),)
            case Rule.TWO_ROWS:
                half = shape[rows] // 2
                gate = self._range(half)
                return rows, (gate, slice(gate.start + half, gate.stop + half))
            case Rule.KV_ROWS:
                heads = self.kv_heads(spec.num_key_value_heads)
                per_head = shape[0] // spec.num_key_value_heads
                return 0, (slice(heads.start * per_head, heads.stop * per_head),)
            case Rule.COLUMNS:
                return last, (self._range(shape[last]),)
            case Rule.FIRST_RANK:
                return 0, (slice(0, 0 if self.rank else shape[0]),)
            case Rule.VOCABULARY:
                return 0, (self.vocabulary(shape[0]),)
            case _:
                axis = last if rule is Rule.VALUE_COLUMNS else 0
                return axis, self._linear_ranges(rule, shape[axis], spec)

    def _linear_ranges(self, rule: Rule, size: int, spec: ModelSpec) -> tuple[slice, ...]:
        heads = self._linear_heads(spec)
        key_dim, value_dim = heads.spec.key_head_dim, heads.spec.value_head_dim
        match rule:
            case Rule.CHANNELS:
                return heads.channels
            case Rule.QKVZ_GROUPS:
                return heads.groups([key_dim, key_dim], [value_dim, value_dim])
            case Rule.BA_GROUPS:
                return heads.groups([], [1, 1])
            case _:
                return heads.per_value_head(size // heads.spec.num_value_heads)

    def _linear_heads(self, spec: ModelSpec) -> LinearHeads:
        assert spec.linear_attention is not None, f"{spec.model_type} has no linear attention"
        return LinearHeads.of(spec.linear_attention, self.rank, self.world_size)

    def _local_experts(self, moe: MoeSpec) -> MoeSpec:
        return msgspec.structs.replace(
            moe,
            intermediate_size=moe.intermediate_size // self.world_size,
            shared_intermediate_size=moe.shared_intermediate_size // self.world_size,
        )

    def _range(self, size: int) -> slice:
        part = size // self.world_size
        return slice(self.rank * part, (self.rank + 1) * part)


def check_world_size(spec: ModelSpec, world_size: int) -> None:
    """Check that a model can be split so. Raises: UnsupportedArchitecture, InvalidValue.

    The error names the first quantity that does not divide, and the world sizes that do.
    """
    if world_size == 1:
        return
    if spec.model_type not in SHARDED_MODEL_TYPES:
        raise UnsupportedArchitecture(
            f"tensor_parallel = {world_size} is not supported for model_type {spec.model_type}; "
            f"supported: {', '.join(sorted(SHARDED_MODEL_TYPES))}; use tensor_parallel = 1",
            model_type=spec.model_type,
        )
    fault = next(_faults(spec, world_size), None)
    if fault is not None:
        raise InvalidValue(
            f"tensor_parallel = {world_size}: {fault}; allowed for this model: "
            f"{_listing(allowed_world_sizes(spec))}",
            param="tensor_parallel",
        )


def allowed_world_sizes(spec: ModelSpec) -> list[int]:
    """Return the world sizes that divide every quantity of the model."""
    sizes = range(1, MAX_WORLD_SIZE + 1)
    return [size for size in sizes if next(_faults(spec, size), None) is None]


def _faults(spec: ModelSpec, world_size: int) -> Iterator[str]:
    for quantity, value in _divided(spec).items():
        if value % world_size:
            yield f"{quantity} = {value} is not a multiple of it"
    for quantity, value in _shared(spec).items():
        if value % world_size and world_size % value:
            yield f"{quantity} = {value} is neither a multiple nor a divisor of it"
    if (world_size - 1) * -(-spec.vocab_size // world_size) >= spec.vocab_size:
        yield f"vocab_size = {spec.vocab_size} leaves a rank without tokens"


def _divided(spec: ModelSpec) -> dict[str, int]:
    """Return what every rank holds an equal part of."""
    sizes = {"num_attention_heads": spec.num_attention_heads}
    if not all(spec.is_sparse(layer) for layer in range(spec.num_hidden_layers)):
        sizes["intermediate_size"] = spec.intermediate_size
    if spec.moe is not None:
        sizes["moe_intermediate_size"] = spec.moe.intermediate_size
        sizes["shared_expert_intermediate_size"] = spec.moe.shared_intermediate_size
    if spec.linear_attention is not None:
        sizes["linear_num_value_heads"] = spec.linear_attention.num_value_heads
    return sizes


def _shared(spec: ModelSpec) -> dict[str, int]:
    """Return what several ranks may hold the same of."""
    heads = {"num_key_value_heads": spec.num_key_value_heads}
    if spec.linear_attention is not None:
        heads["linear_num_key_heads"] = spec.linear_attention.num_key_heads
    return heads


def _listing(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))
