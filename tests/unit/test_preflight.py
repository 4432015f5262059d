"""What `llmo check` finds: counts, truncation, samples as tokens, a forecast; for stored and for raw inputs alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from llmo import specfile
from llmo.context import NullContext
from llmo.errors import ModelError, NeedsError, SpecError
from llmo.preflight import run
from llmo.specs import ProjectSpec
from support.project import project
from support.tiny import tiny_dataset


def checked(folder: Path, machine: Mapping[str, Any] = MappingProxyType({}), **inputs: Path) -> dict:
    spec = specfile.read(folder / "llmo.yaml", ProjectSpec).spec
    sources = {
        "data": {"source": str(folder / "tickets.csv"), "digest": None, "uploads": None},
        "model": {"source": str(folder / "base"), "digest": None, "uploads": None},
    }
    (folder / "out").mkdir()
    return run({"project": spec.plain(), "sources": sources, **machine}, inputs, folder / "out", NullContext())


def test_a_raw_source_is_told_of_before_anything_is_made(tmp_path: Path) -> None:
    project(tmp_path, rows=120)
    found = checked(tmp_path)
    assert found["rows"]["read"] == 120
    assert sum(found["labels"].values()) == found["rows"]["read"] - found["rows"]["dropped"]
    tokens = found["tokens"]
    assert tokens["max_length"] == 32
    assert tokens["longest"] >= tokens["p95"] >= tokens["mean"] / 2
    assert tokens["truncated_count"] == round(tokens["truncated"] * tokens["sampled"])
    assert len(found["samples"]) == 3
    assert all(sample["tokens"].startswith("[CLS]") for sample in found["samples"])
    assert found["forecast"]["memory_bytes"] > 0
    assert (tmp_path / "out" / "report.json").exists()


def test_what_a_search_would_vary_is_told_and_what_it_cannot_measure_refused(tmp_path: Path) -> None:
    file = project(tmp_path, rows=120, extra="tune: {trials: 3}\n")
    assert [one["key"] for one in checked(tmp_path)["tune"]] == ["warmup", "weight_decay", "dropout"]
    file.write_text(file.read_text().replace("dev: 0.2", "dev: 0.0"))
    (tmp_path / "out" / "report.json").unlink()
    (tmp_path / "out").rmdir()
    with pytest.raises(SpecError, match="the dev split is empty"):
        checked(tmp_path)


def test_a_stored_data_set_is_told_of_too(tmp_path: Path) -> None:
    project(tmp_path)
    stored = tiny_dataset(tmp_path / "stored")
    assert set(checked(tmp_path, data=stored)) == set(checked_raw(tmp_path / "raw"))


def checked_raw(folder: Path) -> dict:
    project(folder, rows=120)
    return checked(folder)


@pytest.mark.parametrize("task", ["extractive-qa", "sentence-embedding", "regression"])
def test_rows_of_every_task_are_told_of_as_the_model_reads_them(tmp_path: Path, task: str) -> None:
    project(tmp_path)
    spec = tmp_path / "llmo.yaml"
    spec.write_text(spec.read_text().replace("text-classification", task))
    found = checked(tmp_path, data=tiny_dataset(tmp_path / "stored", task))
    assert found["tokens"]["truncated_count"] == 0
    assert len(found["samples"]) == (0 if task == "regression" else 3)  # the stored card of these tests has none
    assert all(sample["tokens"].startswith("[CLS]") for sample in found["samples"])
    assert all(sample["answer"] for sample in found["samples"])


def test_a_model_with_only_a_slow_tokeniser_is_converted(tmp_path: Path) -> None:
    project(tmp_path, rows=120)
    base = tmp_path / "base"
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(base / "tokenizer.json")).get_vocab()
    (base / "tokenizer.json").unlink()
    (base / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)), encoding="utf-8")
    assert checked(tmp_path)["tokens"]["longest"] > 2


def test_a_model_that_would_be_refused_is_refused_now(tmp_path: Path) -> None:
    project(tmp_path, rows=120)
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        checked(tmp_path)


def test_a_length_the_model_cannot_read_is_refused_now(tmp_path: Path) -> None:
    file = project(tmp_path, rows=120)
    file.write_text(file.read_text().replace("max_length: 32", "max_length: 8000"))
    with pytest.raises(SpecError, match="reads at most"):
        checked(tmp_path)


def test_a_plan_that_no_memory_here_holds_is_refused_now(tmp_path: Path) -> None:
    project(tmp_path, rows=120)
    with pytest.raises(NeedsError, match=r"needs about .* and LLMO may use 0\.1 GiB here"):
        checked(tmp_path, {"memory": 100 << 20})


def test_finished_trainings_move_the_forecast(tmp_path: Path) -> None:
    for name in ("a", "b"):
        project(tmp_path / name, rows=120)
    found = checked(tmp_path / "a", {"memory": 64 << 30})["forecast"]
    one = {"forecast_bytes": 1 << 30, "peak_bytes": 2 << 30, "method": "full", "parameters": 0}
    moved = checked(tmp_path / "b", {"memory": 64 << 30, "history": [one] * 40})["forecast"]
    assert found["fits"] is moved["fits"] is True
    assert moved["memory_bytes"] > 1.5 * found["memory_bytes"]
    assert moved["runs"] == 40
