"""`llmo tune`: searches for the settings of a project's training within a budget, and trains with the best."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Annotated, Any

import typer

from llmo import specfile
from llmo.doors import flow
from llmo.doors.cli import summary
from llmo.doors.cli.live import Live
from llmo.doors.cli.project import File, portable
from llmo.doors.cli.show import Json, console, emit, table
from llmo.doors.cli.trials import show_search
from llmo.errors import SpecError
from llmo.specs import ProjectSpec


def register(app: typer.Typer) -> None:
    app.command()(tune)


def tune(
    file: File,
    trials: Annotated[int | None, typer.Option(help="Settings that are tried at most.")] = None,
    budget: Annotated[str | None, typer.Option(help="Time for all trials together: 90s, 10m, 2h.")] = None,
    sampler: Annotated[str | None, typer.Option(help="tpe, random, grid or nsga2.")] = None,
    pruner: Annotated[str | None, typer.Option(help="asha, hyperband or none.")] = None,
    folds: Annotated[int | None, typer.Option(help="Cross-validate over so many parts.")] = None,
    objective: Annotated[
        str | None, typer.Option(help="quality, or quality with seconds, memory or latency: quality,latency")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say what would be varied; train nothing.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do every step again, even those found done.")] = False,
    as_json: Json = False,
) -> None:
    """Search for good settings of a project's `train` section, and train the model with the best of them.

    The flags are keys of the section `tune`, and come before what the file says there.

    Example: llmo tune examples/newsdesk/llmo.yaml --trials 12 --budget 30m
    """
    given: dict[str, Any] = {"trials": trials, "budget": budget, "sampler": sampler, "pruner": pruner, "folds": folds}
    given["objectives"] = None if objective is None else [name.strip() for name in objective.split(",")]
    spec, project = _project(file, {key: value for key, value in given.items() if value is not None})
    with closing(flow.connect()) as api, Live(api, quiet=as_json) as live:
        if explain:
            report = flow.result(flow.wait(api, api.check(project), live.hear))
            emit({"space": report["tune"], "tune": project["tune"]}, as_json, lambda: _explain(spec, report))
            return
        steps = flow.result(flow.wait(api, api.run(project, fresh=fresh), live.hear))["steps"]
        shown = {"ref": steps["train"]["ref"], "report": steps["tune"]["ref"], **steps["tune"]["result"]}
        shown["test"] = steps["train"]["result"]["test"]
        page = flow.page(api, steps["tune"]["output"])
    emit(shown, as_json, lambda: _show(spec, steps, page))


def _project(file: File, given: Mapping[str, Any]) -> tuple[ProjectSpec, dict[str, Any]]:
    """The project as far as its training, with what was given beside the file. Raises SpecError."""
    whole = portable(specfile.read(file, ProjectSpec).spec, file)
    project = {**whole, "tune": {**(whole["tune"] or {}), **given}, "compress": None, "deploy": None}
    try:
        spec = specfile.validate(project, ProjectSpec)
    except SpecError as error:  # the file itself was sound
        error.where = "the flags of `llmo tune`"
        raise
    return spec, spec.plain()


def _explain(spec: ProjectSpec, report: Mapping[str, Any]) -> None:
    if spec.tune is None:
        return
    rows = [(one["key"], one["choice"], one["why"]) for one in report["tune"]]
    table(f"{spec.name}: what the search varies", ["key of train", "values", "why"], rows)
    most = f"{spec.tune.most} trials" if spec.tune.trials or not spec.tune.budget else "as many trials as fit"
    within = f" within {spec.tune.budget:g} s" if spec.tune.budget else ""
    folds = f", each on {spec.tune.folds} folds" if spec.tune.folds else ""
    console.print(f"\n{most}{within}{folds}; sampler {spec.tune.sampler}, pruner {spec.tune.prunes}", soft_wrap=True)
    console.print(f"one training is {report['forecast']['steps']} steps as the file has it", soft_wrap=True)


def _show(spec: ProjectSpec, steps: Mapping[str, Any], page: str | None) -> None:
    show_search(steps["tune"]["result"])
    summary.show_run(spec, {"train": steps["train"]})
    where = page or f"in the store of the server, as {steps['tune']['ref']}"
    console.print(f"report {where}", markup=False, soft_wrap=True)
