"""What a GGUF file says of itself, read and checked before any weight is loaded: a cut or odd file is an error here.

The library ends the whole process on some contradictions; those that can be seen in the header are looked for first.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmo.engines.llamacpp.library import GgufParams, complaint, library
from llmo.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SMALLEST = 24  # bytes: magic, version, how many tensors, how many keys
UINT32, STRING, ARRAY = 4, 8, 9  # gguf_type
EMBEDDING = "token_embd.weight"
PRECISIONS = {0: "fp32", 1: "fp16", 7: "int8", 32: "bf16"}  # by general.file_type


@dataclass(frozen=True, slots=True)
class Header:
    """`cell` is how many numbers a token's keys and values take; `precision` is empty for what has no name here."""

    architecture: str
    precision: str
    cell: int
    end: int | None


def read_header(path: Path) -> Header:
    """Raises ModelError for a file that is not GGUF, is cut, or does not describe a decoder."""
    try:
        with open(path, "rb") as file:
            start = file.read(SMALLEST)
    except OSError as error:
        raise _broken(path, f"it cannot be read ({error.strerror})") from error
    if len(start) < SMALLEST or start[:4] != MAGIC:
        raise _broken(path, "it is not a GGUF file")
    if int.from_bytes(start[4:8], "little") not in VERSIONS:
        raise _broken(path, "it is of a GGUF version this engine does not read")
    call = library()
    handle = call.gguf_init_from_file(os.fsencode(path), GgufParams(no_alloc=True))
    if not handle:
        raise _broken(path, complaint() or "its header cannot be read")
    try:
        return _described(_Fields(call, handle), path)
    finally:
        call.gguf_free(handle)


def _described(fields: _Fields, path: Path) -> Header:
    _check_extents(fields, path)
    architecture = fields.text("general.architecture")
    if not architecture:
        raise _broken(path, "it does not name its architecture")
    tokens = fields.strings("tokenizer.ggml.tokens")
    if not tokens:
        raise _broken(path, "it holds no vocabulary")
    if len(set(tokens)) < len(tokens):
        raise _broken(path, "two of its tokens are the same text")
    layers, width, heads = (
        fields.number(f"{architecture}.{key}") for key in ("block_count", "embedding_length", "attention.head_count")
    )
    if not layers or not width or not heads or not fields.number(f"{architecture}.context_length"):
        raise _broken(path, f"its header does not describe a decoder (architecture {architecture!r})")
    shared = fields.number(f"{architecture}.attention.head_count_kv") or heads
    key = fields.number(f"{architecture}.attention.key_length") or width // heads
    value = fields.number(f"{architecture}.attention.value_length") or width // heads
    return Header(
        architecture=architecture,
        precision=PRECISIONS.get(fields.number("general.file_type", -1), ""),
        cell=layers * shared * (key + value),
        end=fields.number("tokenizer.ggml.eos_token_id", -1) if fields.has("tokenizer.ggml.eos_token_id") else None,
    )


def _check_extents(fields: _Fields, path: Path) -> None:
    call, handle, size = fields.call, fields.handle, path.stat().st_size
    start, embedded = call.gguf_get_data_offset(handle), False
    for i in range(call.gguf_get_n_tensors(handle)):
        end = start + call.gguf_get_tensor_offset(handle, i) + call.gguf_get_tensor_size(handle, i)
        name = call.gguf_get_tensor_name(handle, i).decode("utf-8", "replace")
        embedded = embedded or name == EMBEDDING
        if end > size:
            raise _broken(path, f"it is cut: the weight {name} ends at byte {end}, the file at {size}")
    if not embedded:
        raise _broken(path, f"it has no weight {EMBEDDING}")


class _Fields:
    """Keys by name; asking the library for a type that a key is not would end the process."""

    def __init__(self, call: Any, handle: int) -> None:
        self.call, self.handle = call, handle

    def has(self, name: str) -> bool:
        return bool(self.call.gguf_find_key(self.handle, name.encode()) >= 0)

    def number(self, name: str, default: int = 0) -> int:
        key = self._key(name, UINT32)
        return default if key is None else int(self.call.gguf_get_val_u32(self.handle, key))

    def text(self, name: str) -> str:
        key = self._key(name, STRING)
        return "" if key is None else str(self.call.gguf_get_val_str(self.handle, key).decode("utf-8", "replace"))

    def strings(self, name: str) -> list[bytes]:
        """A list of texts; empty for none, or a list of something else."""
        key = self._key(name, ARRAY)
        if key is None or self.call.gguf_get_arr_type(self.handle, key) != STRING:
            return []
        return [
            self.call.gguf_get_arr_str(self.handle, key, i) for i in range(self.call.gguf_get_arr_n(self.handle, key))
        ]

    def _key(self, name: str, kind: int) -> int | None:
        key = self.call.gguf_find_key(self.handle, name.encode())
        return key if key >= 0 and self.call.gguf_get_kv_type(self.handle, key) == kind else None


def _broken(path: Path, why: str) -> ModelError:
    return ModelError(
        f"the GGUF file cannot be used: {why}", where=str(path), hint="write it again with `llmo compress`"
    )
