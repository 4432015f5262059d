"""`llmo export`: a model as a folder that runs without LLMO."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from llmo.doors import flow
from llmo.doors.cli.live import follow
from llmo.doors.cli.show import Json, console, emit, table


def register(app: typer.Typer) -> None:
    app.command()(export)


def export(
    model: Annotated[str, typer.Argument(help="A stored model: NAME, NAME@VERSION or its digest.")],
    target: Annotated[
        str, typer.Option(help="edge (with a runner that answers), onnx or openvino (graph and tokeniser alone).")
    ] = "edge",
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A folder that is not there yet; default: MODEL-TARGET.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32 or int8; default: as the model was compressed, else fp32.")
    ] = None,
    max_mb: Annotated[float | None, typer.Option(help="Largest size of the folder, in millions of bytes.")] = None,
    as_json: Json = False,
) -> None:
    """Write a model into a folder that runs without LLMO, with a manifest of digests; exit code 3, and nothing written,
    when it is larger than --max-mb or does not answer as the model does.

    Example: llmo export newsdesk-compressed --target edge --max-mb 30
    """
    with closing(flow.connect()) as api:
        job = flow.export(api, model, out, target=target, precision=precision, max_mb=max_mb)
        found = flow.result(follow(api, job, as_json))
    emit(found, as_json, lambda: _show(found))


def _show(found: Mapping[str, Any]) -> None:
    place = Path(found["out"])
    place = place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place
    rows = [(name, _megabytes(known["size"])) for name, known in found["files"].items()]
    title = f"{found['model']} for {found['target']} in {place}: {found['precision']}, {_megabytes(found['bytes'])}"
    table(title, ["file", "size>"], rows)
    console.print(f"made of {found['made_of']}", markup=False, soft_wrap=True)
    if found["target"] == "edge":
        console.print(f"try: python {place}/run.py --check", markup=False, soft_wrap=True)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
