"""The kernels' C interface: structures as decoder.cpp has them. Their sizes are compared when it loads."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from functools import lru_cache
from typing import Any

from llmo.engines.native.build import opened


class Linear(Structure):
    _fields_ = (
        ("weight", c_void_p), ("scale", c_void_p), ("bias", c_void_p),
        ("n", c_int32), ("k", c_int32), ("fine", c_int32),
    )  # fmt: skip


class Layer(Structure):
    _fields_ = (
        ("before_attention", c_void_p), ("before_mlp", c_void_p), ("query_norm", c_void_p), ("key_norm", c_void_p),
        ("qkv", Linear), ("out", Linear), ("gate_up", Linear), ("down", Linear),
    )  # fmt: skip


class Model(Structure):
    _fields_ = (
        ("layers", c_int32), ("hidden", c_int32), ("heads", c_int32), ("kv_heads", c_int32), ("dim", c_int32),
        ("inner", c_int32), ("quantised", c_int32), ("eps", c_float), ("layer", POINTER(Layer)), ("norm", c_void_p),
        ("embedding", c_void_p), ("turns", c_void_p), ("head", Linear),
    )  # fmt: skip


class Lora(Structure):
    _fields_ = (
        ("down", c_void_p),
        ("up", c_void_p),
        ("scale", c_void_p),
        ("reach", c_void_p),
        ("parts", c_int32),
        ("rank", c_int32),
    )


class Adapter(Structure):
    _fields_ = (("group", Lora * 4),)


class Step(Structure):
    _fields_ = (
        ("rows", c_int32), ("prompt", c_int32), ("wanted", c_int32), ("ids", c_void_p), ("positions", c_void_p),
        ("table", c_void_p), ("tables", c_void_p), ("wanted_rows", c_void_p), ("adapters", c_void_p),
        ("keys", c_void_p), ("values", c_void_p), ("blocks", c_int64), ("logits", c_void_p),
    )  # fmt: skip


@lru_cache(maxsize=1)
def kernels() -> Any:
    """`llmo_open(model, threads, context)`, `llmo_step(crew, step)` and `llmo_close(crew)` of decoder.cpp."""
    found = opened("decoder.cpp", "llmo_size", (Linear, Layer, Model, Adapter, Step))
    found.llmo_open.restype, found.llmo_open.argtypes = c_void_p, [POINTER(Model), c_int32, c_int32]
    found.llmo_step.restype, found.llmo_step.argtypes = c_int32, [c_void_p, POINTER(Step)]
    found.llmo_close.restype, found.llmo_close.argtypes = None, [c_void_p]
    return found
