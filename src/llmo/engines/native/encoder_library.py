"""The C interface of encoder.cpp: its structures, whose sizes are compared when it loads."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_float, c_int32, c_void_p
from functools import lru_cache
from typing import Any

from llmo.engines.native.build import opened

SOURCE = "encoder.cpp"
ACTIVATIONS = ("none", "gelu", "relu", "silu", "tanh")  # as encoder.cpp numbers them


class Matrix(Structure):
    _fields_ = (
        ("weight", c_void_p), ("scale", c_void_p), ("start", c_void_p), ("bias", c_void_p),
        ("n", c_int32), ("k", c_int32),
    )  # fmt: skip


class Norm(Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p))


class Layer(Structure):
    _fields_ = (
        ("qkv", Matrix), ("out", Matrix), ("up", Matrix), ("down", Matrix), ("attended", Norm), ("fed", Norm),
        ("heads", c_int32),
    )  # fmt: skip


class Head(Structure):
    _fields_ = (
        ("dense", Matrix), ("weight", c_void_p), ("bias", c_void_p), ("labels", c_int32), ("activation", c_int32),
        ("first", c_int32),
    )  # fmt: skip


class Model(Structure):
    _fields_ = (
        ("layers", c_int32), ("hidden", c_int32), ("dim", c_int32), ("activation", c_int32), ("eps", c_float),
        ("words", c_void_p), ("word_scale", c_void_p), ("places", c_void_p), ("embedded", Norm),
        ("layer", POINTER(Layer)), ("head", Head),
    )  # fmt: skip


class Batch(Structure):
    _fields_ = (
        ("texts", c_int32), ("ids", c_void_p), ("begin", c_void_p), ("logits", c_void_p), ("means", c_void_p),
    )  # fmt: skip


@lru_cache(maxsize=1)
def kernels() -> Any:
    """`llmo_encoder_open(model, threads)`, `llmo_encode(encoder, batch)` and `llmo_encoder_close(encoder)`."""
    found = opened(SOURCE, "llmo_encoder_size", (Matrix, Layer, Head, Model, Batch))
    found.llmo_encoder_open.restype, found.llmo_encoder_open.argtypes = c_void_p, [POINTER(Model), c_int32]
    found.llmo_encode.restype, found.llmo_encode.argtypes = c_int32, [c_void_p, POINTER(Batch)]
    found.llmo_encoder_close.restype, found.llmo_encoder_close.argtypes = None, [c_void_p]
    return found
