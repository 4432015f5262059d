"""What `llmo check` and `llmo run` tell: the data, the plan, before and after, the variants, the endpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from rich.markup import escape

from llmo.doors.cli.report import calibrated, run_of
from llmo.doors.cli.show import console, figure, shorten, size, table
from llmo.doors.cli.trials import show_search
from llmo.doors.cli.variants import show_variants
from llmo.doors.gateway import Door
from llmo.specfile import Resolved
from llmo.specs import ProjectSpec
from llmo.types import Device

Steps = Mapping[str, Mapping[str, Any]]
# The metrics a summary shows, of those the task has.
SHOWN = (
    *("accuracy", "micro_f1", "f1", "precision", "recall", "macro_f1", "exact_match", "no_answer_accuracy"),
    *("r2", "rmse", "mae", "spearman", "mrr", "recall_at_1", "recall_at_10"),
    *("perplexity", "loss", "token_accuracy", "preference_accuracy", "margin"),
    *("masked_perplexity", "masked_accuracy", "recall@10", "ndcg@10"),
)


def resolved(found: Resolved[ProjectSpec]) -> list[dict[str, Any]]:
    """Every leaf of the specification: its dotted key, value and origin (`FILE:LINE` or `default`)."""
    return list(_leaves(found, found.spec, ""))


def _leaves(found: Resolved[ProjectSpec], section: BaseModel, prefix: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for name in type(section).model_fields:
        value, key = getattr(section, name), f"{prefix}{name}"
        if isinstance(value, BaseModel):
            entries += _leaves(found, value, f"{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            for number, one in enumerate(value):
                entries += _leaves(found, one, f"{key}.{number}.")
        else:
            origin = found.origin(key)
            if origin == "default" and key.endswith("task.name"):  # of a task that is written as its name
                origin = found.origin(prefix.rstrip("."))
            entries.append({"key": key, "value": value, "origin": origin})
    return entries


def show_resolved(entries: Sequence[Mapping[str, Any]]) -> None:
    table("", ["key", "value", "from"], [(e["key"], _yaml(e["value"]), e["origin"]) for e in entries])


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


def show_plan(spec: ProjectSpec, plan: Sequence[Mapping[str, Any]]) -> None:
    console.print(f"[bold]{spec.name}[/]: {spec.task.name}")
    rows = [(number, step["key"], step["title"], _state(step)) for number, step in enumerate(plan, 1)]
    table("", ["", "step", "what", "state"], rows)
    console.print()


def _state(step: Mapping[str, Any]) -> str:
    return f"done ({step['ref']})" if step["state"] == "done" and step["ref"] else str(step["state"])


def show_check(spec: ProjectSpec, report: Mapping[str, Any]) -> None:
    need = report["forecast"]
    facts = [
        *_facts(report),
        ("memory", f"{_needed(need)}; {_free(report['devices'])}"),
        ("disk", f"about {size(need['disk_bytes'])}"),
        ("steps", f"{need['steps']} optimiser steps"),
    ]
    table(f"{spec.name}: {spec.task.name}", ["", ""], facts)
    for note in [*report["notes"], *_may_not_fit(need)]:
        console.print(f"  note: {note}", markup=False, soft_wrap=True)
    _show_samples(report)
    for also in spec.also:
        other = report["also"][also.name]
        table(f"{also.name}: {also.task.name}", ["", ""], _facts(other))
        for note in other["notes"]:
            console.print(f"  note: {note}", markup=False, soft_wrap=True)
        _show_samples(other)
    console.print()
    show_plan(spec, report["plan"])


def _facts(report: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Of one data set."""
    tokens = report["tokens"]
    return [
        ("rows", ", ".join(f"{name} {count}" for name, count in report["rows"].items())),
        ("labels", ", ".join(f"{name} {count}" for name, count in report["labels"].items()))
        if report["labels"]
        else ("learnt", report["shape"]),
        ("duplicates", report["duplicates"]),
        ("empty", report["empty"]),
        ("encodings", ", ".join(f"{name} {count}" for name, count in report["encodings"].items()) or "-"),
        ("characters", f"median {report['median_characters']}, longest {report['longest_characters']}"),
        ("tokens", f"mean {tokens['mean']:.0f}, 95% under {tokens['p95']}, longest {tokens['longest']}"),
        ("truncated", _truncated(tokens)),
    ]


def _show_samples(report: Mapping[str, Any]) -> None:
    console.print("\n[bold]three samples as the model will see them[/]")
    for sample in report["samples"]:
        console.print(f"  {sample['tokens']}\n    -> {sample['answer']}", markup=False, soft_wrap=True)


def _truncated(tokens: Mapping[str, Any]) -> str:
    of = f" (of {tokens['sampled']} sampled)" if tokens["sampled"] < tokens["texts"] else ""
    return f"{tokens['truncated_count']} texts, {tokens['truncated']:.1%}, at max_length {tokens['max_length']}{of}"


def _needed(need: Mapping[str, Any]) -> str:
    count = need["runs"]
    runs = f" (corrected by {count} finished training{'s' if count > 1 else ''})" if count else ""
    return f"{size(need['memory_bytes'])} ± {need['error']:.0%} to train{runs}"


def _may_not_fit(need: Mapping[str, Any]) -> list[str]:
    if need.get("fits", True):
        return []
    what = "the training may not fit into the memory that LLMO may use here"
    return [f"{what}; the nearest that does: {need['instead']}" if need["instead"] else what]


def _free(devices: Sequence[Device]) -> str:
    return ", ".join(f"{d.name} has {size(d.free)} free of {size(d.memory)}" for d in devices if d.usable)


def show_run(
    spec: ProjectSpec, steps: Steps, door: Door | None = None, answers: Sequence[Mapping[str, Any]] = ()
) -> None:
    console.print()
    if "data" in steps:
        _show_data(steps["data"])
    if "tune" in steps:
        show_search(steps["tune"]["result"])
    _show_quality(steps)
    for also in spec.also:
        _show_part(also.name, steps)
    if "compress" in steps:
        show_variants(steps["compress"]["result"])
    if "verify" in steps:
        show_verify(steps["verify"]["result"])
    if door is not None and spec.deploy is not None:
        _show_endpoint(door, spec.deploy.endpoint, answers)


def _show_data(step: Mapping[str, Any]) -> None:
    rows, dropped = step["result"]["rows"], step["result"]["dropped"]
    table(
        f"data {step['ref']}",
        ["rows read>", "train>", "dev>", "test>", "dropped>", "cleaned"],
        [
            (
                rows["read"], rows["train"], rows["dev"], rows["test"], rows["dropped"],
                ", ".join(f"{name} {count}" for name, count in step["result"]["changed"].items() if count) or "nothing",
            )
        ],
    )  # fmt: skip
    if dropped:
        reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in dropped.items())
        console.print(f"  dropped: {reasons}   [dim]see: llmo data show {step['ref']} --dropped[/]", soft_wrap=True)
    console.print()


def _show_quality(steps: Steps) -> None:
    trained = steps["train"]["result"]
    _show_metrics(steps["train"]["ref"], trained, steps.get("evaluate", {}).get("result", {}).get("metrics"))
    for line in (calibrated(trained.get("calibration")), run_of(trained, trained.get("memory", {}))):
        if line:
            console.print(line, markup=False, soft_wrap=True)
    console.print(f"[dim]by class, worst errors: llmo report {steps['train']['ref']}[/]\n", soft_wrap=True)


def _show_metrics(ref: str, trained: Mapping[str, Any], served: Mapping[str, Any] | None = None) -> None:
    """Of a model on its test rows, before and after training; and as it is `served`, if it is compressed."""
    test = trained["test"]
    columns = ["on held-out documents", "before training>", "after training>"] + (["served>"] if served else [])
    rows = [
        [name.replace("_", " "), figure(test["before"][name]), figure(test["after"][name])]
        + ([figure(served[name]) if name in served else "-"] if served else [])
        for name in SHOWN
        if name in test["after"]
    ]
    table(f"model {ref}", columns, rows)


def _show_part(name: str, steps: Steps) -> None:
    """Another task that was learnt together with the first."""
    found, ref = steps["train"]["result"]["also"][name], steps[f"part:{name}"]["ref"]
    _show_metrics(ref, found)
    if calibrated(found["calibration"]):
        console.print(calibrated(found["calibration"]), markup=False, soft_wrap=True)
    console.print(f"[dim]by class, worst errors: llmo report {ref}[/]")
    show_verify(steps[f"verify:{name}"]["result"])


def show_verify(result: Mapping[str, Any]) -> None:
    for found in result["checks"]:
        mark = "[green]✓[/]" if found["passed"] else "[red]✗[/]"
        console.print(f"{mark} {escape(found['text'])}", soft_wrap=True)
    console.print()


def _show_endpoint(door: Door, name: str, answers: Sequence[Mapping[str, Any]]) -> None:
    writes = any("text" in found["answer"] for found in answers)
    sample = () if not answers or isinstance(answers[0]["asked"], str) else (answers[0]["asked"],)
    console.print(f"[bold]endpoint[/] {door.chat if writes else door.endpoint(name)}")
    console.print(door.curl_chat(name) if writes else door.curl(name, *sample), markup=False, soft_wrap=True)
    console.print()
    for found in answers:
        console.print(f"  {shorten(found['text'], 88)}", markup=False)
        console.print(f"    -> {brief(found['answer'])}   (true: {found['true']})", markup=False, soft_wrap=True)


def brief(answer: Mapping[str, Any]) -> str:
    if "entities" in answer:
        return (
            ", ".join(f"{e['label']} '{e['text']}' {e['start']}-{e['end']}" for e in answer["entities"]) or "no entity"
        )
    if "items" in answer:
        return ", ".join(f"{item['item']} ({item['score']:.3f})" for item in answer["items"][:5])
    if "labels" in answer:
        return ", ".join(answer["labels"]) or "no label"
    if "text" in answer:
        return shorten(answer["text"], 200)
    if "answer" in answer:
        return f"{answer['answer'] or 'no answer'} ({answer['score']:.3f})"
    for name in ("value", "similarity"):
        if name in answer:
            return f"{answer[name]:.4g}"
    if "embedding" in answer:
        return f"{len(answer['embedding'])} numbers: {', '.join(f'{x:.3f}' for x in answer['embedding'][:4])}, ..."
    return f"{answer['label']} ({answer['score']:.3f})"
