"""Translates what torch and safetensors raise when the machine has no more room: memory, or disk."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from llmo.files import storage_errors


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """As `storage_errors`, also for safetensors, which wraps the operating system's refusals in an error of its own."""
    with storage_errors(path):
        try:
            yield
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


# Of torch's allocator, of C++, and of oneDNN, which says the same of all but descriptors when it finds no memory.
_NO_MEMORY = re.compile(r"can't allocate memory|std::bad_alloc|could not create a primitive(?! descriptor)")


class StepTooLarge(MemoryError):
    """There was no memory for a step: smaller parts of its batch may fit."""


@contextmanager
def memory_errors(kind: type[MemoryError] = MemoryError) -> Iterator[None]:
    """Turn torch's allocation failures, on the CPU or a GPU, into MemoryError, which ends a job as out_of_memory, or
    into the given kind of it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise kind(_hint(error)) from error
    except RuntimeError as error:
        if not _NO_MEMORY.search(str(error)):
            raise
        raise kind(_hint(error)) from error
    except MemoryError as error:  # Python's or NumPy's own
        if isinstance(error, kind):
            raise
        raise kind(_hint(error)) from error


def _hint(error: BaseException) -> str:
    asked = re.search(r"tried to allocate ([0-9.]+ \w+)", str(error))
    return (
        f"no memory for {asked[1] if asked else 'this batch'} more: lower train.batch_size or task.max_length, "
        "or raise train.gradient_accumulation_steps"
    )
