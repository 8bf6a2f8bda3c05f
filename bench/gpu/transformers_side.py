"""transformers on the same device and shape: `generate` one by one, and continuous batching."""

from __future__ import annotations

import random
import time
from typing import Final

import torch

from bench.gpu.workloads import prompt_of
from cortexd.models import ModelSpec

_NUM_TOKENS: Final = 128
# Of the offline workload's 256 requests, so that the slow side does not eat the ten minutes.
_NUM_REQUESTS: Final = 256


@torch.inference_mode()
def transformers_tok_s(spec: ModelSpec) -> tuple[float, float]:
    """Return output tokens per second of one stream, and of the offline workload (sdpa)."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_hidden_layers,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        tie_word_embeddings=spec.tie_word_embeddings,
        dtype=torch.bfloat16,
    )
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(config).bfloat16().eval()
    prompt = torch.tensor([prompt_of(512)], device="cuda")
    generation = GenerationConfig(
        max_new_tokens=_NUM_TOKENS, min_new_tokens=_NUM_TOKENS, do_sample=False, eos_token_id=-1
    )
    rates = []
    for _ in range(2):
        started = time.perf_counter()
        model.generate(prompt, generation_config=generation)
        torch.cuda.synchronize()
        rates.append(_NUM_TOKENS / (time.perf_counter() - started))
    return rates[-1], _batched(model)


def _batched(model: torch.nn.Module) -> float:
    from transformers import GenerationConfig

    generator = random.Random(0)
    lengths = [generator.randint(100, 1024) for _ in range(_NUM_REQUESTS)]
    prompts = [prompt_of(length, seed=number) for number, length in enumerate(lengths)]
    generation = GenerationConfig(max_new_tokens=562, do_sample=False, eos_token_id=-1)
    started = time.perf_counter()
    outputs = model.generate_batch(inputs=prompts, generation_config=generation)  # type: ignore[operator]
    count = sum(len(output.generated_tokens) for output in outputs.values())
    return count / (time.perf_counter() - started)
