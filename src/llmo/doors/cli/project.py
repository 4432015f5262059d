"""`llmo check` and `llmo run`: a whole project from one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from llmo import specfile
from llmo.api import Api
from llmo.data import gold
from llmo.doors import flow
from llmo.doors.cli import summary
from llmo.doors.cli.live import Live
from llmo.doors.cli.show import Json, console, emit, shorten
from llmo.doors.gateway import Door, gateway
from llmo.specs import ProjectSpec
from llmo.types import Asked

File = Annotated[Path, typer.Argument(help="The specification, e.g. llmo.yaml.")]


def register(app: typer.Typer) -> None:
    app.command()(check)
    app.command()(run)


def check(
    file: File,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Print every key with its value and where that came from.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check a specification and its data before any compute, and show the plan.

    Example: llmo check examples/newsdesk/llmo.yaml
    """
    found = specfile.read(file, ProjectSpec)
    if resolved:
        entries = summary.resolved(found)
        emit(entries, as_json, lambda: summary.show_resolved(entries))
        return
    project = portable(found.spec, file)
    with closing(flow.connect()) as api, Live(api, quiet=as_json) as live:
        job = flow.wait(api, api.check(project), live.hear)
        report = {**flow.result(job), "plan": api.plan(project), "devices": api.devices()}
    emit(report, as_json, lambda: summary.show_check(found.spec, report))


def run(
    file: File,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do every step again, even those found done.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep serving until Ctrl-C.")] = False,
    as_json: Json = False,
) -> None:
    """Run a project: clean, train, compress, verify, serve. Steps that are done already are found, not repeated.

    Example: llmo run examples/newsdesk/llmo.yaml
    """
    spec = specfile.read(file, ProjectSpec).spec
    project = portable(spec, file)
    with closing(flow.connect()) as api:
        if not as_json:
            summary.show_plan(spec, api.plan(project))
        with Live(api, quiet=as_json) as live:
            steps = flow.result(flow.wait(api, api.run(project, fresh=fresh), live.hear))["steps"]
        if spec.deploy is None:
            emit({"steps": steps}, as_json, lambda: summary.show_run(spec, steps))
            return
        with gateway(api) as door:
            answers = ask(api, spec.deploy.endpoint, steps, door)
            shown = {"steps": steps, "endpoint": door.endpoint(spec.deploy.endpoint), "answers": answers}
            emit(shown, as_json, lambda: summary.show_run(spec, steps, door, answers))
            if not as_json:
                console.print(f"\n{_future(door, keep)}")
            if keep:
                with suppress(KeyboardInterrupt):  # how serving is meant to end
                    door.wait()


def _future(door: Door, keep: bool) -> str:
    if keep:
        return "serving until Ctrl-C"
    if door.lasting:
        return f"the server goes on serving it at {door.url}"
    return "the endpoint ends with this command; to keep it: llmo up, or --keep (KEEP=1 make demo)"


def ask(api: Api, endpoint: str, steps: Mapping[str, Any], door: Door) -> list[dict[str, Any]]:
    """Three held-out documents, sent to the endpoint over HTTP: text, true label and answer."""
    model = api.artifact(steps["train"]["output"])
    rows = api.rows(model.inputs["data"], "test", limit=1000)
    # Of different labels, or different questions.
    different = list({str(row.get("label") or _asked(row)): row for row in rows}.values())[:3]
    asked = [_asked(row) for row in different]
    return [
        {"text": row["text"] if isinstance(one, Mapping) else one, "asked": one, "true": _truth(row), "answer": answer}
        for row, one, answer in zip(different, asked, door.predict(endpoint, asked), strict=True)
    ]


def _asked(row: Mapping[str, Any]) -> Asked:
    """A row's text, or two by name, or of a conversation the question that its last answer answers."""
    if "answers" in row:
        return {"question": row["text"], "context": row["pair"]}
    if "pair" in row:
        return {"text": row["text"], "pair": row["pair"]}
    if not row.get("messages"):
        return str(row["text"])
    asked = [message["content"] for message in json.loads(row["messages"]) if message["role"] == "user"]
    return str(asked[-1])


def _truth(row: Mapping[str, Any]) -> str:
    if "messages" in row:
        spoken = [*json.loads(row["messages"] or "[]"), *json.loads(row.get("chosen") or "[]")]
        return shorten(str(spoken[-1]["content"])) if spoken else "-"
    return gold.told(row)


def portable(spec: ProjectSpec, file: Path) -> dict[str, Any]:
    """The project with local paths made absolute, taken relative to the file they are written in."""
    project = spec.plain()
    for one in (project, *project["also"]):
        one["data"]["source"] = flow.located(one["data"]["source"], file.parent)
    project["model"] = flow.located(project["model"], file.parent)
    return project
