"""llama.cpp's C functions, out of the `xllamacpp` wheel: the declarations, and the check that they are still true.

The wheel's own interface is a server: it opens a port, takes over SIGINT and SIGTERM, and neither scores a prompt nor
frees a stream at once. The library inside it exports the C interface under it, which does all of that, so that is
what is called. C structs have no names at run time: before anything else is called, the defaults that the library
writes into them are compared with those of the layout declared here, byte for byte and to the end.
"""

from __future__ import annotations

import ctypes as c
import functools
import sys
from collections import deque
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from platform import machine
from typing import Any

from llmo.errors import EnvironmentProblem

PACKAGE = "xllamacpp"
TESTED = "2026.10.11549"
SENTINEL = 0xA5
SPARE = 256  # bytes after a struct's end, to see where the library's own ends
ERROR, CONTINUED = 4, 5  # ggml_log_level


class ModelParams(c.Structure):
    """`llama_model_params`."""

    _fields_ = (
        ("devices", c.c_void_p),
        ("tensor_buft_overrides", c.c_void_p),
        ("n_gpu_layers", c.c_int32),
        ("split_mode", c.c_int32),
        ("load_mode", c.c_int32),
        ("lazy_mode", c.c_int32),
        ("main_gpu", c.c_int32),
        ("tensor_split", c.c_void_p),
        ("progress_callback", c.c_void_p),
        ("progress_data", c.c_void_p),
        ("kv_overrides", c.c_void_p),
        ("vocab_only", c.c_bool),
        ("check_tensors", c.c_bool),
        ("use_extra_bufts", c.c_bool),
        ("no_host", c.c_bool),
        ("no_alloc", c.c_bool),
        ("load_mtp", c.c_bool),
    )


class ContextParams(c.Structure):
    """`llama_context_params`."""

    _fields_ = (
        ("n_ctx", c.c_uint32),
        ("n_batch", c.c_uint32),
        ("n_ubatch", c.c_uint32),
        ("n_seq_max", c.c_uint32),
        ("n_rs_seq", c.c_uint32),
        ("n_outputs_max", c.c_uint32),
        ("n_outputs_max_per_seq", c.c_uint32),
        ("n_threads", c.c_int32),
        ("n_threads_batch", c.c_int32),
        ("ctx_type", c.c_int32),
        ("rope_scaling_type", c.c_int32),
        ("pooling_type", c.c_int32),
        ("attention_type", c.c_int32),
        ("flash_attn_type", c.c_int32),
        ("rope_freq_base", c.c_float),
        ("rope_freq_scale", c.c_float),
        ("yarn_ext_factor", c.c_float),
        ("yarn_attn_factor", c.c_float),
        ("yarn_beta_fast", c.c_float),
        ("yarn_beta_slow", c.c_float),
        ("yarn_orig_ctx", c.c_uint32),
        ("defrag_thold", c.c_float),
        ("cb_eval", c.c_void_p),
        ("cb_eval_data", c.c_void_p),
        ("type_k", c.c_int32),
        ("type_v", c.c_int32),
        ("abort_callback", c.c_void_p),
        ("abort_data", c.c_void_p),
        ("reserved", c.c_void_p),  # empty in the tested version; nothing here sets it
        ("embeddings", c.c_bool),
        ("offload_kqv", c.c_bool),
        ("no_perf", c.c_bool),
        ("op_offload", c.c_bool),
        ("swa_full", c.c_bool),
        ("kv_unified", c.c_bool),
        ("samplers", c.c_void_p),
        ("n_samplers", c.c_size_t),
        ("ctx_other", c.c_void_p),
    )


class Batch(c.Structure):
    """`llama_batch`: tokens of any streams, each with its position, its stream and whether its logits are wanted."""

    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.POINTER(c.c_float)),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    )


class GgufParams(c.Structure):
    """`gguf_init_params`."""

    _fields_ = (("no_alloc", c.c_bool), ("ctx", c.c_void_p))


MODEL_DEFAULTS: dict[str, Any] = {
    "n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "use_extra_bufts": True,
}  # fmt: skip
CONTEXT_DEFAULTS: dict[str, Any] = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max_per_seq": 1, "n_threads": 4,
    "n_threads_batch": 4, "rope_scaling_type": -1, "pooling_type": -1, "attention_type": -1, "flash_attn_type": -1,
    "yarn_ext_factor": -1.0, "yarn_attn_factor": -1.0, "yarn_beta_fast": -1.0, "yarn_beta_slow": -1.0,
    "defrag_thold": -1.0, "type_k": 1, "type_v": 1, "offload_kqv": True, "no_perf": True, "op_offload": True,
    "swa_full": True,
}  # fmt: skip

_HANDLE, _INT, _TEXT = c.c_void_p, c.c_int32, c.c_char_p
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_model_load_from_file": (_HANDLE, (_TEXT, ModelParams)),
    "llama_model_free": (None, (_HANDLE,)),
    "llama_model_get_vocab": (_HANDLE, (_HANDLE,)),
    "llama_model_n_ctx_train": (_INT, (_HANDLE,)),
    "llama_model_n_layer": (_INT, (_HANDLE,)),
    "llama_model_has_encoder": (c.c_bool, (_HANDLE,)),
    "llama_model_has_decoder": (c.c_bool, (_HANDLE,)),
    "llama_model_is_recurrent": (c.c_bool, (_HANDLE,)),
    "llama_model_is_hybrid": (c.c_bool, (_HANDLE,)),
    "llama_model_is_diffusion": (c.c_bool, (_HANDLE,)),
    "llama_vocab_n_tokens": (_INT, (_HANDLE,)),
    "llama_vocab_is_eog": (c.c_bool, (_HANDLE, _INT)),
    "llama_init_from_model": (_HANDLE, (_HANDLE, ContextParams)),
    "llama_free": (None, (_HANDLE,)),
    "llama_n_ctx": (c.c_uint32, (_HANDLE,)),
    "llama_get_memory": (_HANDLE, (_HANDLE,)),
    "llama_memory_seq_rm": (c.c_bool, (_HANDLE, _INT, _INT, _INT)),
    "llama_memory_seq_cp": (None, (_HANDLE, _INT, _INT, _INT, _INT)),
    "llama_decode": (_INT, (_HANDLE, Batch)),
    "llama_get_logits_ith": (c.POINTER(c.c_float), (_HANDLE, _INT)),
    "gguf_init_from_file": (_HANDLE, (_TEXT, GgufParams)),
    "gguf_free": (None, (_HANDLE,)),
    "gguf_find_key": (c.c_int64, (_HANDLE, _TEXT)),
    "gguf_get_kv_type": (_INT, (_HANDLE, c.c_int64)),
    "gguf_get_arr_n": (c.c_size_t, (_HANDLE, c.c_int64)),
    "gguf_get_arr_type": (_INT, (_HANDLE, c.c_int64)),
    "gguf_get_arr_str": (_TEXT, (_HANDLE, c.c_int64, c.c_size_t)),
    "gguf_get_val_u32": (c.c_uint32, (_HANDLE, c.c_int64)),
    "gguf_get_val_str": (_TEXT, (_HANDLE, c.c_int64)),
    "gguf_get_n_tensors": (c.c_int64, (_HANDLE,)),
    "gguf_get_tensor_name": (_TEXT, (_HANDLE, c.c_int64)),
    "gguf_get_tensor_offset": (c.c_size_t, (_HANDLE, c.c_int64)),
    "gguf_get_tensor_size": (c.c_size_t, (_HANDLE, c.c_int64)),
    "gguf_get_data_offset": (c.c_size_t, (_HANDLE,)),
}
_LOG = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
_complaints: deque[str] = deque(maxlen=50)


def complaint() -> str:
    """The first error the library wrote since it was last asked, "" when it wrote none."""
    lines = [line.strip() for line in "".join(_complaints).splitlines() if line.strip()]
    _complaints.clear()
    return lines[0][:300] if lines else ""


def _heard(level: int, text: bytes | None, _: object) -> None:
    if level in (ERROR, CONTINUED) and text:
        _complaints.append(text.decode("utf-8", "replace"))


_log = _LOG(_heard)  # the library keeps its address: it must live as long as the process


@functools.cache
def library() -> c.CDLL:
    """The library, declared, checked and silent; one a process. Raises EnvironmentProblem where it cannot be used."""
    found = _open()
    try:
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
        found.llama_log_set.restype, found.llama_log_set.argtypes = None, (_LOG, c.c_void_p)
    except AttributeError as error:
        raise _other(f"it does not export {error}") from error
    for kind, name, defaults in (
        (ModelParams, "llama_model_default_params", MODEL_DEFAULTS),
        (ContextParams, "llama_context_default_params", CONTEXT_DEFAULTS),
    ):
        if returned(found, name, kind) != _expected(kind, defaults):
            raise _other(f"{name} does not describe the layout this driver was written for")
    _check_batch(found)
    found.llama_log_set(_log, None)
    found.llama_backend_init()
    return found


def returned(found: c.CDLL, name: str, kind: type[c.Structure], *arguments: int) -> bytes:
    """The struct that `name` returns, and what follows it: the sentinel in every byte that was not written."""
    room = (c.c_uint8 * (c.sizeof(kind) + SPARE))(*[SENTINEL] * (c.sizeof(kind) + SPARE))
    # On x86-64 a struct of this size is returned through a pointer that the caller passes first. Passing our own
    # instead of declaring the return type shows which bytes were written.
    function = c.CFUNCTYPE(c.c_void_p, c.c_void_p, *[c.c_int32] * len(arguments))((name, found))
    function(c.addressof(room), *arguments)
    return bytes(room)


def _expected(kind: type[c.Structure], defaults: dict[str, Any]) -> bytes:
    value = kind()
    c.memset(c.byref(value), SENTINEL, c.sizeof(value))
    for name, *_ in kind._fields_:
        setattr(value, name, defaults.get(name, getattr(kind(), name)))
    return bytes(value) + bytes([SENTINEL]) * SPARE


def _check_batch(found: c.CDLL) -> None:
    raw = returned(found, "llama_batch_init", Batch, 8, 0, 1)
    batch = Batch.from_buffer_copy(raw)
    arrays = (batch.token, batch.pos, batch.n_seq_id, batch.seq_id, batch.logits)
    if batch.n_tokens or batch.embd or not all(arrays) or raw[c.sizeof(Batch) :] != bytes([SENTINEL]) * SPARE:
        raise _other("llama_batch has another layout than this driver was written for")
    found.llama_batch_free.restype, found.llama_batch_free.argtypes = None, (Batch,)
    found.llama_batch_free(batch)


def _open() -> c.CDLL:
    if machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        raise EnvironmentProblem(
            f"the llamacpp engine runs on Linux on x86-64, not on {sys.platform} on {machine()}",
            hint="use the torch or the openvino engine here",
        )
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentProblem(
            f"the package {PACKAGE} is not installed", hint=f"pip install 'llmo-os[llamacpp]', or {PACKAGE}=={TESTED}"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob(f"{PACKAGE}*.so"))
    if not files:
        raise _other("there is no shared library in it")
    try:
        return c.CDLL(str(files[0]))
    except OSError as error:
        raise _other(str(error)) from error


def _other(why: str) -> EnvironmentProblem:
    try:
        installed = version(PACKAGE)
    except PackageNotFoundError:
        installed = "of an unknown version"
    return EnvironmentProblem(
        f"{PACKAGE} {installed} is not one this driver can call: {why}", hint=f"install {PACKAGE}=={TESTED}"
    )
