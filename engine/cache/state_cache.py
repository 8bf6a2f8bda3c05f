"""The recurrent state of linear-attention layers: a fixed pool of slots beside the paged KV cache.

A sequence holds one slot from its admission to its end; `SlotPool` hands them out. A slot is not
cleared when it changes hands: a layer ignores what it holds for a sequence's first token, and so
does a copy into it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cortexd.models import ModelSpec
from engine.cache.slot_pool import NULL_SLOT


class StateCache:
    """S and the convolution's tail of all linear-attention layers, by layer and slot."""

    def __init__(
        self, spec: ModelSpec, num_slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Take `num_slots` usable slots; the null slot comes on top. `dtype` is the tail's."""
        linear = spec.linear_attention
        assert linear is not None, f"{spec.model_type} has no linear attention"
        outer = (len(spec.linear_layers), num_slots + 1)
        heads = (linear.num_value_heads, linear.key_head_dim, linear.value_head_dim)
        # float32 whatever the model's dtype: rounding S each step costs two digits.
        self.recurrent = torch.zeros(*outer, *heads, dtype=torch.float32, device=device)
        tail = (linear.conv_kernel - 1, linear.conv_size)
        self.conv_tails = torch.zeros(*outer, *tail, dtype=dtype, device=device)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """All that a state consists of: (num_linear_layers, num_slots + 1, ...) each."""
        return self.recurrent, self.conv_tails

    @property
    def memory_bytes(self) -> int:
        """Bytes of all slots."""
        return self.recurrent.nbytes + self.conv_tails.nbytes

    def copy(self, source: int, target: int) -> None:
        """Make slot `target` hold what `source` holds, in all layers."""
        assert NULL_SLOT not in (source, target), "the null slot holds nothing"
        for states in self.tensors:
            states[:, target].copy_(states[:, source])
