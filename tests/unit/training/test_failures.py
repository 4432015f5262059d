"""No room, told as what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from llmo.errors import StorageError
from llmo.training.failures import disk_errors, memory_errors


def test_an_allocation_that_fails_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match=r"no memory for 4\d+ bytes more: lower train\.batch_size"), memory_errors():
        torch.zeros(10**14)


def test_a_product_that_finds_no_memory_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="no memory for this batch"), memory_errors():
        raise RuntimeError("could not create a primitive")  # of oneDNN, which says no more
    with pytest.raises(RuntimeError, match="descriptor"), memory_errors():
        raise RuntimeError("could not create a primitive descriptor for a matmul primitive")


def test_other_runtime_errors_are_left_alone() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"), memory_errors():
        torch.zeros(2) + torch.zeros(3)


def test_a_full_disk_behind_safetensors_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is full"), disk_errors(tmp_path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_what_safetensors_says_of_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        save_file({"a": torch.zeros(3)}, tmp_path / "nowhere" / "x.safetensors")


def test_a_broken_file_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(SafetensorError), disk_errors(tmp_path):
        raise SafetensorError("Error while deserializing header: header too small")
