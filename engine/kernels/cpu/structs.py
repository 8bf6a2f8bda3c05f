"""The C++ structs of the kernels' interface, field by field as in their headers."""

from __future__ import annotations

import ctypes

Pointer = ctypes.c_void_p
Size = ctypes.c_int64


class PlainRows(ctypes.Structure):
    """GGML rows, `row_bytes` apart."""

    _fields_ = [("data", Pointer), ("row_bytes", Size), ("rows", Size)]


class Matrix(ctypes.Structure):
    """A packed weight matrix with its bias."""

    _fields_ = [
        ("type", ctypes.c_int32),
        ("precision", ctypes.c_int32),
        ("rows", Size),
        ("columns", Size),
        ("packed", Pointer),
        ("bias", Pointer),
    ]


class Projection(ctypes.Structure):
    """Matrices of equal width whose outputs stand side by side."""

    _fields_ = [("parts", ctypes.POINTER(Matrix)), ("num_parts", Size)]


class AttentionShape(ctypes.Structure):
    """Heads, head size, cache block size, score scale."""

    _fields_ = [
        ("num_heads", Size),
        ("num_kv_heads", Size),
        ("head_dim", Size),
        ("block_size", Size),
        ("scale", ctypes.c_float),
    ]


class SequenceRow(ctypes.Structure):
    """Query tokens start..end-1, the last of which sees kv_len positions."""

    _fields_ = [
        ("start", Size),
        ("end", Size),
        ("kv_len", Size),
        ("first_slot", Size),
        ("block_ids", Pointer),
    ]


class DeltaNetShape(ctypes.Structure):
    """Heads and sizes of the Gated DeltaNet layers; see delta_net.h."""

    _fields_ = [
        ("num_key_heads", Size),
        ("num_value_heads", Size),
        ("key_dim", Size),
        ("value_dim", Size),
        ("conv_kernel", Size),
        ("has_tiled_heads", ctypes.c_int32),
        ("norm_eps", ctypes.c_float),
    ]


class DeltaNetWeights(ctypes.Structure):
    """What a Gated DeltaNet layer has beside its projections."""

    _fields_ = [
        ("conv", Pointer),
        ("decay_rate", Pointer),
        ("dt_bias", Pointer),
        ("norm", Pointer),
    ]


class ExpertWeights(ctypes.Structure):
    """One expert's gated feed-forward."""

    _fields_ = [("gate_up", Projection), ("down", Projection)]


class SparseWeights(ctypes.Structure):
    """A mixture of experts; see experts.h."""

    _fields_ = [
        ("entry", Projection),
        ("experts", ctypes.POINTER(ExpertWeights)),
        ("shared_down", Projection),
        ("num_experts", Size),
        ("num_chosen", Size),
        ("normalizes", ctypes.c_int32),
    ]


class LayerWeights(ctypes.Structure):
    """One decoder layer."""

    _fields_ = [
        ("input_norm", Pointer),
        ("input", Projection),
        ("head_norm", Pointer),
        ("delta_net", ctypes.POINTER(DeltaNetWeights)),
        ("output", Projection),
        ("mlp_norm", Pointer),
        ("gate_up", Projection),
        ("down", Projection),
        ("experts", ctypes.POINTER(SparseWeights)),
    ]


class DecoderWeights(ctypes.Structure):
    """A whole model but its embedding."""

    _fields_ = [
        ("attention", AttentionShape),
        ("has_output_gates", ctypes.c_int32),
        ("delta_net", DeltaNetShape),
        ("hidden_size", Size),
        ("rotary_half", Size),
        ("inverse_frequencies", Pointer),
        ("rope_scale", ctypes.c_float),
        ("norm_eps", ctypes.c_float),
        ("num_layers", Size),
        ("layers", ctypes.POINTER(LayerWeights)),
        ("final_norm", Pointer),
        ("head", Projection),
    ]


class DecoderStep(ctypes.Structure):
    """What one step computes, and where."""

    _fields_ = [
        ("num_tokens", Size),
        ("hidden", Pointer),
        ("positions", Pointer),
        ("slots", Pointer),
        ("num_rows", Size),
        ("rows", ctypes.POINTER(SequenceRow)),
        ("cache", Pointer),
        ("layer_stride", Size),
        ("num_slots", Size),
        ("state_slots", Pointer),
        ("is_fresh", Pointer),
        ("recurrent", Pointer),
        ("recurrent_stride", Size),
        ("tails", Pointer),
        ("tails_stride", Size),
        ("num_state_slots", Size),
        ("num_logit_rows", Size),
        ("logit_rows", Pointer),
        ("logits", Pointer),
    ]
