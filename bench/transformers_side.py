"""`python -m bench.transformers_side THREADS`: transformers in bfloat16 as a side of `bench.cpu`.

A model of the benchmark's shape with random weights, eager, greedy, a dynamic cache.
"""

from __future__ import annotations

import sys

import torch
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from bench.model_files import QWEN3_0_6B, Shape
from bench.runner import Timed, serve


class TransformersSide:
    """The model in this process."""

    def __init__(self, shape: Shape, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        torch.set_default_dtype(torch.bfloat16)
        config = Qwen3Config(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            tie_word_embeddings=True,
        )
        self._model = Qwen3ForCausalLM(config)
        self._model.requires_grad_(False)
        self._vocab_size = shape.vocab

    def prefill(self, num_tokens: int, timed: Timed) -> None:
        """Measure one prompt and its first token."""
        ids = torch.randint(self._vocab_size, (1, num_tokens))
        timed(lambda: self._run(ids, DynamicCache(config=self._model.config), 1))

    def decode(self, batch: int, num_prompt: int, num_tokens: int, timed: Timed) -> None:
        """Measure the steps after the prompts."""
        ids = torch.randint(self._vocab_size, (batch, num_prompt))
        cache = DynamicCache(config=self._model.config)
        ids = self._run(ids, cache, 1)
        timed(lambda: self._run(ids, cache, num_tokens))

    def _run(self, ids: torch.Tensor, cache: DynamicCache, num_steps: int) -> torch.Tensor:
        for _ in range(num_steps):
            out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1:].argmax(-1)
        return ids


def main() -> int:
    """Make the model and serve; return the exit code."""
    with torch.inference_mode():
        return serve(TransformersSide(QWEN3_0_6B, int(sys.argv[1])))


if __name__ == "__main__":
    raise SystemExit(main())
