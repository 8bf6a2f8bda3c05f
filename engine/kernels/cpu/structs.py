"""The C++ structs of the kernels' interface, as in pack.h, attention.h and decoder.h."""

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


class LayerWeights(ctypes.Structure):
    """One decoder layer."""

    _fields_ = [
        ("input_norm", Pointer),
        ("qkv", Projection),
        ("head_norm", Pointer),
        ("output", Projection),
        ("mlp_norm", Pointer),
        ("gate_up", Projection),
        ("down", Projection),
    ]


class DecoderWeights(ctypes.Structure):
    """A whole model but its embedding."""

    _fields_ = [
        ("attention", AttentionShape),
        ("hidden_size", Size),
        ("intermediate_size", Size),
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
        ("num_logit_rows", Size),
        ("logit_rows", Pointer),
        ("logits", Pointer),
    ]
