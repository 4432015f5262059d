"""The operation compress on a really trained model: what it writes, what it chooses, and when it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmo.compression.choice import UNSURE, Limits, choose, refusal, why
from llmo.compression.encoders import wants_shapes
from llmo.compression.operation import run
from llmo.compression.recipes import recipes
from llmo.compression.report import front
from llmo.compression.shapes.distil import Recovery
from llmo.context import NullContext
from llmo.engines.base import Request
from llmo.engines.torch import TorchEngine
from llmo.errors import DataError, GateRefused, ModelError, SpecError
from llmo.specs import CompressSpec, TaskSpec, TrainSpec
from llmo.tasks.card import load_task, load_tokenizer, read_card, reshaped
from llmo.training.operation import run as train
from llmo.types import Device
from llmo.verify.operation import run as verify
from support.tiny import text_rows, tiny_dataset, tiny_model, write_split

QUICK = ("native-int8", "onnx-fp32", "onnx-int8", "onnx-int8-static", "onnx-int8-default")  # to build, of all variants
SPEC = CompressSpec(max_drop=0.5, variants=QUICK).plain()


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compress")
    tiny_model(folder / "base")
    tiny_dataset(folder / "data")
    (folder / "model").mkdir()
    spec = TrainSpec(epochs=3, learning_rate=3e-3, precision="fp32")
    task = TaskSpec(name="text-classification", max_length=32).plain()
    inputs = {"data": folder / "data", "model": folder / "base"}
    train({**spec.plain(), "task": task}, inputs, folder / "model", NullContext(1, folder / "checkpoint"))
    return folder


@pytest.fixture(scope="module")
def done(workshop: Path) -> tuple[Path, dict[str, Any]]:
    out = workshop / "out"
    out.mkdir()
    return out, run(SPEC, {"data": workshop / "data", "model": workshop / "model"}, out, NullContext(1))


def test_every_variant_is_measured_against_the_reference(done: tuple[Path, dict[str, Any]]) -> None:
    _, result = done
    rows = {row["name"]: row for row in result["variants"]}
    assert list(rows) == ["torch-fp32", *QUICK]
    assert (rows["torch-fp32"]["speedup"], rows["torch-fp32"]["drop"]) == (1.0, 0.0)
    assert rows["onnx-fp32"]["agreement"] == 1.0
    assert [rows[name]["bits"] for name in ("torch-fp32", "onnx-fp32")] == [32.0, 32.0]
    assert rows["onnx-int8"]["bits"] < 20
    for row in rows.values():
        figures = ("size_bytes", "texts_per_second", "latency_ms", "rss_bytes", "ready_seconds", "speedup_alone")
        assert min(row[name] for name in figures) > 0
        assert list(row["clients"]) == ["1", "16", "64"]
        assert row["drop_low"] <= row["drop"] <= row["drop_high"]
        assert 0 <= row["probability_change"] < 0.5
        assert row["verdict"]
    assert rows["torch-fp32"]["rss_bytes"] > rows["onnx-fp32"]["rss_bytes"] > 20 << 20
    json.dumps(result, allow_nan=False)


def test_the_folder_is_whole_and_holds_nothing_else(done: tuple[Path, dict[str, Any]], workshop: Path) -> None:
    out, result = done
    weights = {"native": "native.safetensors", "onnx": "model.onnx"}[read_card(out)["engine"]]
    expected = {"config.json", "golden.json", "llmo.json", weights, "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (out / "report").iterdir()} == {"report.json", "report.html", "front.png"}
    found = {path.name for path in out.iterdir() if path.is_file()}
    assert expected <= found <= expected | {"special_tokens_map.json", "added_tokens.json"}
    card = read_card(out)
    assert card["chosen"].startswith(f"{card['engine']}-{card['precision']}")
    assert card["chosen"] == result["chosen"]
    assert card["hardware"]["cores"] == 1
    assert card["variants"] == result["variants"]
    assert card["reference"]["metrics"] == read_card(workshop / "model")["metrics"]
    chosen = next(row for row in result["variants"] if row["name"] == result["chosen"])
    dev = card["metrics"]["dev"][chosen["metric"]]
    assert dev["low"] <= dev["value"] == chosen["value"] <= dev["high"]
    assert (out / weights).stat().st_size == chosen["size_bytes"]


def test_the_report_shows_every_variant_and_the_front(done: tuple[Path, dict[str, Any]]) -> None:
    out, result = done
    told = json.loads((out / "report" / "report.json").read_text())
    assert told["kind"] == "compression"
    assert told["variants"] == result["variants"]
    page = (out / "report" / "report.html").read_text()
    for one in result["variants"]:
        assert one["name"] + (" *" if one["name"] in result["front"] else "") + "</pre>" in page
    assert result["chosen"] in result["front"]
    assert "data:image/png;base64" in page


def test_the_front_holds_what_nothing_beats_at_once() -> None:
    table = [
        sized("torch-fp32", 1.0, 1.0, 100, 0),
        sized("quick", 9.0, 9.0, 50, 0),
        sized("small", 2.0, 2.0, 10, 0, drop=0.01),
        sized("beaten", 2.0, 2.0, 60, 0, drop=0.01),
        sized("twin", 9.0, 9.0, 50, 0),
        {"name": "lossy", "drop": 0.5, "verdict": "drops too much"},
        {"name": "absent", "verdict": "cannot run: no"},
    ]
    assert front(table) == ["quick", "small", "twin"]


def test_what_it_wrote_passes_verify(done: tuple[Path, dict[str, Any]], workshop: Path, tmp_path: Path) -> None:
    report = verify({}, {"model": done[0], "reference": workshop / "model"}, tmp_path, NullContext(1))
    assert report["passed"]


def test_a_compressed_model_is_not_compressed_again(
    done: tuple[Path, dict[str, Any]], workshop: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="compressed already"):
        run(SPEC, {"data": workshop / "data", "model": done[0]}, tmp_path, NullContext(1))


def test_without_dev_rows_there_is_nothing_to_measure(workshop: Path, tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "data", sizes={"train": 4, "dev": 0, "test": 4})
    with pytest.raises(DataError, match="no dev rows"):
        run(SPEC, {"data": data, "model": workshop / "model"}, tmp_path, NullContext(1))


def test_a_loss_beyond_the_limit_is_refused(workshop: Path, tmp_path: Path) -> None:
    """Two labels that part the texts at their median: int8 answers those nearest to it otherwise."""
    model = shutil.copytree(workshop / "model", tmp_path / "model")
    rows = text_rows(256, seed=5)
    tensors = load_file(model / "model.safetensors")
    tensors["classifier.bias"] = np.array([0, 0, -1000], np.float32)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    margin = np.median([one[0] - one[1] for one in logits(model, rows)])
    tensors["classifier.bias"][1] = margin
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    labels = load_task(model).labels
    answered = [{**row, "label": labels[int(one.argmax())]} for row, one in zip(rows, logits(model, rows), strict=True)]
    data = tiny_dataset(tmp_path / "data")
    write_split(data / "dev.arrow", answered, "text-classification")
    (tmp_path / "out").mkdir()
    spec = CompressSpec(max_drop=0.0, variants=("onnx-int8",)).plain()
    with pytest.raises(GateRefused, match="onnx-int8: drops too much") as caught:
        run(spec, {"data": data, "model": model}, tmp_path / "out", NullContext(1))
    reference, variant = caught.value.extra["variants"]
    assert reference["value"] == 1.0
    assert variant["drop"] > 0
    assert "compress.max_drop" in caught.value.hint
    assert caught.value.exit_code == 3
    assert list((tmp_path / "out").iterdir()) == []


def logits(model: Path, rows: list[dict[str, Any]]) -> list[np.ndarray]:
    """What the model at fp32 says of each row."""
    engine = TorchEngine()
    engine.load(model, Device("cpu", "cpu", 0, 0, 1))
    encodings = load_task(model).encode(load_tokenizer(model), [row["text"] for row in rows])
    found = {c.id: c.data for c in engine.run([Request(i, e.input_ids) for i, e in enumerate(encodings)])}
    engine.close()
    return [found[i] for i in range(len(rows))]


def row(name: str, speedup: float, drop: float) -> dict[str, Any]:
    return {"name": name, "speedup": speedup, "drop": drop, "verdict": ""}


@pytest.mark.parametrize(
    ("variants", "max_drop", "chosen", "verdicts"),
    [
        ([("a", 2.0, 0.0), ("b", 4.0, 0.0)], 0.0, "b", ["slower than the chosen", "chosen"]),
        ([("a", 2.0, 0.0), ("b", 4.0, 0.01)], 0.005, "a", ["chosen", "drops too much"]),
        ([("a", 2.0, 0.005), ("b", 1.0, 0.0)], 0.005, "a", ["chosen", "no faster than the original"]),
        ([("a", 1.0, 0.0), ("b", 0.9, -0.1)], 0.1, None, ["no faster than the original"] * 2),
        ([("a", 9.0, 0.2)], 0.1, None, ["drops too much"]),
        ([("a", 1.5, -0.02)], 0.0, "a", ["chosen"]),
    ],
)
def test_the_fastest_within_the_limit_is_chosen(
    variants: list[tuple[str, float, float]], max_drop: float, chosen: str | None, verdicts: list[str]
) -> None:
    table = [row("torch-fp32", 1.0, 0.0), *(row(*variant) for variant in variants)]
    assert choose(table, Limits("accuracy", max_drop)) == chosen
    assert [r["verdict"] for r in table] == ["reference", *verdicts]


@pytest.mark.parametrize(
    ("drop", "low", "high", "verdict"),
    [
        (0.001, -0.005, 0.007, "chosen"),
        (-0.02, -0.05, 0.01, UNSURE),  # it did not gain: it was lucky
        (0.0, 0.0, 0.0, "chosen"),
        (0.006, 0.005, 0.007, "drops too much"),
    ],
)
def test_a_loss_counts_with_its_standard_error(drop: float, low: float, high: float, verdict: str) -> None:
    table = [row("torch-fp32", 1.0, 0.0), row("a", 2.0, drop) | {"drop_low": low, "drop_high": high}]
    chosen = choose(table, limits := Limits("f1", 0.005))
    assert table[1]["verdict"] == verdict
    if verdict == UNSURE:
        assert "more dev rows" in (refusal(why(table, chosen, limits), table).hint or "")


def test_the_reason_names_the_better_one_that_too_few_texts_stood_against() -> None:
    table = [
        sized("torch-fp32", 1.0, 1.0, 100, 100),
        sized("safe", 2.0, 2.0, 50, 90),
        sized("quick", 6.0, 6.0, 25, 80) | {"drop_low": -0.02, "drop_high": 0.0196},
        sized("slow", 1.5, 1.5, 60, 80) | {"drop_low": -0.02, "drop_high": 0.02},
    ]
    reason = why(table, choose(table, limits := Limits("f1", 0.005)), limits)
    assert reason.startswith("safe is the fastest")
    assert "; quick (6.0 times the speed) may lose 0.0101: more dev texts" in reason
    assert "slow" not in reason


def sized(name: str, speed: float, alone: float, size: int, memory: int, drop: float = 0.0) -> dict[str, Any]:
    return row(name, speed, drop) | {"speedup_alone": alone, "size_bytes": size, "rss_bytes": memory}


@pytest.mark.parametrize(
    ("target", "max_bytes", "chosen"),
    [("throughput", None, "wide"), ("latency", None, "quick"), ("size", None, "small"), ("memory", None, "lean"),
     ("throughput", 50, "quick"), ("throughput", 20, "small"), ("throughput", 5, None), ("latency", 15, "small")],
)  # fmt: skip
def test_the_target_says_which_is_best_and_the_room_what_may_be(
    target: Any, max_bytes: float | None, chosen: str | None
) -> None:
    table = [
        sized("torch-fp32", 1.0, 1.0, 100, 100),
        sized("wide", 9.0, 2.0, 90, 90),
        sized("quick", 4.0, 5.0, 40, 80),
        sized("small", 2.0, 3.0, 10, 70),
        sized("lean", 3.0, 1.5, 95, 10),
        sized("lossy", 20.0, 20.0, 1, 1, drop=0.1),
    ]
    limits = Limits("accuracy", 0.01, target, max_bytes)
    assert choose(table, limits) == chosen
    verdicts = {one["name"]: one["verdict"] for one in table}
    assert verdicts["lossy"] == "drops too much"
    reason = why(table, chosen, limits)
    if chosen is None:
        assert {verdicts[name] for name in ("wide", "quick", "small", "lean")} == {"too large"}
        assert "compress.max_mb" in (refusal(reason, table).hint or "")
    else:
        assert reason.startswith(f"{chosen} is the ")


def test_a_budget_that_nothing_keeps_to_registers_nothing(workshop: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    spec = CompressSpec(max_drop=0.5, max_mb=0.001, shapes="none", variants=("native-int8",)).plain()
    with pytest.raises(GateRefused, match="too large") as caught:
        run(spec, {"data": workshop / "data", "model": workshop / "model"}, tmp_path / "out", NullContext(1))
    assert caught.value.exit_code == 3
    assert list((tmp_path / "out").iterdir()) == []


def test_a_figure_the_task_does_not_have_is_refused(workshop: Path, tmp_path: Path) -> None:
    spec = CompressSpec(metric="macro_f2").plain()
    with pytest.raises(SpecError, match=r"no 'macro_f2'; did you mean 'macro_f1'"):
        run(spec, {"data": workshop / "data", "model": workshop / "model"}, tmp_path, NullContext(1))


def test_another_figure_can_be_kept_and_when_the_time_is_up_no_variant_is_begun(workshop: Path, tmp_path: Path) -> None:
    spec = CompressSpec(max_drop=0.5, metric="macro_f1", minutes=1e-9).plain()
    with pytest.raises(GateRefused, match="macro_f1 on dev: native-int8: not tried: the time was up"):
        run(spec, {"data": workshop / "data", "model": workshop / "model"}, tmp_path, NullContext(1))


def test_where_no_variant_is_small_enough_a_smaller_shape_is_made(
    workshop: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmo.compression.recipes.RECOVERY", Recovery(samples=300, int8=True))
    sizes = {one["name"]: one["size_bytes"] for one in done[1]["variants"]}
    (tmp_path / "out").mkdir()
    room = 0.9 * sizes["native-int8"] / 1e6
    spec = CompressSpec(max_drop=0.9, max_mb=room, variants=("native-int8",)).plain()
    inputs = {"data": workshop / "data", "model": workshop / "model"}
    result = run(spec, inputs, tmp_path / "out", NullContext(1, tmp_path / "checkpoint"))
    rows = {one["name"]: one for one in result["variants"]}
    assert rows["native-int8"]["verdict"] == "too large"
    assert result["chosen"].endswith("+native-int8")
    assert rows[result["chosen"]]["size_bytes"] <= room * 1e6
    card = read_card(tmp_path / "out")
    assert card["shape"]["steps"][0]["step"] == "vocabulary"
    assert reshaped(card)
    assert card["reference"]["metrics"] == read_card(workshop / "model")["metrics"]
    (tmp_path / "verified").mkdir()
    report = verify(
        {}, {"model": tmp_path / "out", "reference": workshop / "model"}, tmp_path / "verified", NullContext(1)
    )
    assert report["passed"]


def test_shapes_are_tried_only_where_they_are_wanted() -> None:
    table = [sized("torch-fp32", 1.0, 1.0, 100, 100), sized("int8", 4.0, 4.0, 25, 25)]
    fits, small = Limits("accuracy", 0.01, max_bytes=30), Limits("accuracy", 0.01, max_bytes=20)
    assert not wants_shapes(table, Limits("accuracy", 0.01))
    assert not wants_shapes(table, fits)
    assert wants_shapes(table, small)
    assert wants_shapes(table, Limits("accuracy", 0.01, "size"))
    assert wants_shapes(table, replace(fits, shapes="all"))
    assert not wants_shapes(table, replace(small, shapes="none"))
    assert [one["verdict"] for one in table] == ["", ""]


def test_recipes_go_from_mild_to_strong(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536})
    )
    found = recipes(tmp_path)
    assert [one.name for one in found] == [
        "vocabulary", "layers-4", "layers-3", "layers-3-inner-768", "layers-2-inner-768",
    ]  # fmt: skip
    assert [one.saved for one in found] == sorted(one.saved for one in found)
    assert found[2].saved == 3 * (4 * 384**2 + 2 * 384 * 1536)
