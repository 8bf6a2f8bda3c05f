"""Puts one rank's share of a model onto its device: threads, dtype, weights, layers.

Used by the engine on rank 0 and by the shards of the other ranks, in the same way on all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cortexd.models import ModelFiles, ModelSpec
from cortexd.settings import Engine as EngineSettings
from engine import device as devices
from engine.batch import StepBatch
from engine.cache.kv_cache import KVCache
from engine.decode_steps import CapturableModel
from engine.kernels import cpu as native
from engine.loading.loader import Weights
from engine.models.decoder import Decoder
from engine.models.registry import load_class
from engine.tp.comm import Comm

Progress = Callable[[float, str], None]


class Model(Protocol):
    """What `engine/models/*` provide."""

    @property
    def backend_name(self) -> str:
        """What computes: "native", "native layers", "native linears", "triton" or "reference"."""
        ...

    def forward(self, batch: StepBatch, cache: KVCache) -> Tensor:
        """Run the batch; return the logits (num_logit_rows, vocab_size)."""
        ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on its device; `spec` has the sizes of this rank's layers."""

    model: Model
    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    weight_bytes: int
    read_bytes: int  # of the files
    capturable: CapturableModel | None = None  # what runs its decode steps without the host


@torch.inference_mode()
def load_model(
    files: ModelFiles,
    spec: ModelSpec,
    settings: EngineSettings,
    comm: Comm,
    *,
    device: torch.device,
    progress: Progress,
) -> LoadedModel:
    """Load this rank's part of a model; `progress` gets (fraction, stage).

    Raises: BadModelFile, UnsupportedArchitecture, InsufficientMemory, ConfigError.
    """
    devices.set_num_threads(settings, comm.world_size)
    if device.type == "cpu":
        is_possible = settings.backend != "reference" and native.available()
        comm.share_memory(is_possible=is_possible)
    is_quantized = files.format == "gguf" or files.quant is not None
    dtype = devices.choose_dtype(settings, device, spec, is_quantized)
    weights = Weights.open(
        files,
        spec,
        device=device,
        dtype=dtype,
        backend=devices.choose_backend(settings, device, spec),
        progress=lambda done, total: progress(done / max(total, 1), "loading weights"),
        comm=comm,
    )
    local_spec = comm.shard.local_spec(spec)
    try:
        weights.check_memory()
        model: Decoder = load_class(spec.model_type)(local_spec, weights)
        weights.check_all_used()
    finally:
        weights.close()
    if model.backend_name == "native":
        devices.leave_threads_to_native()
    # Of several ranks only the first would know the tokens.
    is_alone = comm.world_size == 1 and model.fused is not None and model.fused.is_capturable
    return LoadedModel(
        model,
        local_spec,
        device,
        dtype,
        weight_bytes=weights.memory_bytes,
        read_bytes=weights.total_bytes,
        capturable=model.fused if is_alone else None,
    )
