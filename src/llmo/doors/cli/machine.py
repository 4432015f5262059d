"""What there is: devices, models, endpoints, and whether this machine and installation work."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import typer

from llmo.doors import doctor as doctor_checks
from llmo.doors import flow
from llmo.doors.cli.server import endpoints_table
from llmo.doors.cli.show import Json, ago, console, emit, figure, size, table
from llmo.errors import InputError
from llmo.types import Artifact, Kind


def register(app: typer.Typer) -> None:
    for command in (devices, models, endpoints, adapters, doctor):
        app.command()(command)


def devices(as_json: Json = False) -> None:
    """List what computes here, and why a device can or cannot be used.

    Example: llmo devices
    """
    with closing(flow.connect()) as api:
        found = api.devices()
    rows = [
        (d.name, d.kind, d.cores, size(d.memory), size(d.free), "yes" if d.usable else "no", d.reason) for d in found
    ]
    emit(found, as_json, lambda: table("", ["device", "kind", "cores>", "memory>", "free>", "usable", "why"], rows))


def models(
    ref: Annotated[str | None, typer.Argument(help="One model, in full, with its lineage.")] = None,
    as_json: Json = False,
) -> None:
    """List the stored models, or show one with its lineage.

    Example: llmo models newsdesk@1
    """
    with closing(flow.connect()) as api:
        if ref is not None:
            found = api.artifact(ref, Kind.MODEL)
            line = api.lineage(found.digest)
            emit({"model": found, "lineage": line}, as_json, lambda: _show_model(found, line))
            return
        all_models = api.artifacts(Kind.MODEL)
    rows = [
        (a.ref, a.card.get("engine", "-"), a.card.get("precision", "-"), _quality(a), size(a.size), ago(a.created_at))
        for a in all_models
    ]
    columns = ["model", "engine", "precision", "held-out quality", "size>", "made"]
    emit(
        all_models, as_json, lambda: table("", columns, rows, empty="no models; make one with: llmo run or llmo train")
    )


def _quality(model: Artifact) -> str:
    after = model.card.get("metrics", {}).get("test", {}).get("after", {})
    return next((f"{name} {figure(value)}" for name, value in after.items()), "-")


def _show_model(model: Artifact, line: list[Artifact]) -> None:
    card = model.card
    facts = [
        ("digest", model.digest),
        ("size", size(model.size)),
        ("made", ago(model.created_at)),
        ("job", str(model.job or "-")),
    ]
    facts += [
        (key, str(card[key]))
        for key in ("origin", "engine", "precision", "method", "parameters", "trained_parameters", "code")
        if key in card
    ]
    facts += [
        (f"test {name}", figure(v)) for name, v in card.get("metrics", {}).get("test", {}).get("after", {}).items()
    ]
    table(f"model {model.ref}", ["", ""], facts)
    table(
        "\nlineage",
        ["", "kind", "digest", "made"],
        [(a.ref, a.kind.value, a.digest[:19], ago(a.created_at)) for a in line],
    )


def endpoints(
    remove: Annotated[str | None, typer.Option(help="Take this endpoint down and forget it.")] = None,
    as_json: Json = False,
) -> None:
    """List the endpoints, what is behind them, and whether they answer.

    Example: llmo endpoints
    """
    with closing(flow.connect()) as api:
        if remove is not None:
            api.remove_endpoint(remove)
        found = api.endpoints()
    emit(found, as_json, lambda: console.print(endpoints_table(found)))


def adapters(
    endpoint: Annotated[str, typer.Argument(help="The endpoint.")],
    add: Annotated[
        str | None,
        typer.Option(metavar="NAME=MODEL", help="Answer with this model's adapter or head, or peft's folder, too."),
    ] = None,
    remove: Annotated[str | None, typer.Option(help="Take the adapter of this name away.")] = None,
    as_json: Json = False,
) -> None:
    """List an endpoint's adapters (and heads, over an encoder); each is asked for as the model ENDPOINT:NAME.

    Example: llmo adapters assistant --add formal=formal@2
    """
    name, _, model = (add or "").partition("=")
    if add is not None and not (name and model):
        raise InputError(f"'{add}' names no adapter and model", hint="write it like --add formal=formal@2")
    with closing(flow.connect()) as api:
        if remove is not None:
            api.remove_adapter(endpoint, remove)
        if add is not None:
            api.add_adapter(endpoint, name, flow.adapter(api, endpoint, name, model))
        found = api.adapters(endpoint)
    rows = [
        (f"{a.endpoint}:{a.name}", a.model_ref, ago(a.created_at), "yes" if a.answers else "no: of another base")
        for a in found
    ]
    empty = f"no adapters; add one with: llmo adapters {endpoint} --add NAME=MODEL"
    emit(found, as_json, lambda: table("", ["model", "version", "added", "answers"], rows, empty=empty))


def doctor(as_json: Json = False) -> None:
    """Check the machine and the installation, with the line that mends what does not work.

    Example: llmo doctor
    """
    found = doctor_checks.examine()
    rows = [("✓" if c.works else "-" if c.optional else "✗", c.name, c.found, c.mend) for c in found]
    emit(found, as_json, lambda: table("", ["", "what", "found", "to mend it"], rows))
    if not all(c.works or c.optional for c in found):
        raise typer.Exit(1)
