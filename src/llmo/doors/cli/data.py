"""`llmo data`: import, show, list."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from llmo.doors import flow
from llmo.doors.cli.given import Fresh, Set, assignments
from llmo.doors.cli.live import follow
from llmo.doors.cli.show import Json, ago, emit, shorten, size, table
from llmo.types import Artifact, Kind

_TOLD_BY_TEXT = ("messages", "tools", "chosen", "rejected")  # a conversation's text is its transcript

app = typer.Typer(name="data", help="Data sets: import, show, list.", no_args_is_help=True, rich_markup_mode=None)


def register(to: typer.Typer) -> None:
    to.add_typer(app)


@app.command("import")
def data_import(
    source: Annotated[str, typer.Argument(help="A file, a folder, or package:NAME/FOLDER.")],
    name: Annotated[str, typer.Option(help="What the data set is called in the store.")],
    task: Annotated[str, typer.Option(help="What it is for.")] = "text-classification",
    text: Annotated[str | None, typer.Option(help="The column that holds the text.")] = None,
    label: Annotated[str | None, typer.Option(help="The column that holds the label.")] = None,
    settings: Set = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Read, clean, deduplicate and split a source into a stored data set.

    Example: llmo data import tickets.csv --name tickets --text body --label queue
    """
    told = {key: value for key, value in (("text", text), ("label", label)) if value is not None}
    spec = {"source": flow.absolute(source, Path()), "task": task, **told, **assignments(settings)}
    with closing(flow.connect()) as api:
        job = follow(api, api.submit("import", spec, name=name, fresh=fresh), as_json)
        artifact = flow.output(api, job)
        shown = {"ref": artifact.ref, "digest": artifact.digest, **flow.result(job)}
        emit(shown, as_json, lambda: _show_dataset(artifact))


@app.command("show")
def data_show(
    ref: Annotated[str, typer.Argument(help="NAME, NAME@VERSION or a digest.")],
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "train",
    dropped: Annotated[bool, typer.Option("--dropped", help="Show the rows that were left out, with reasons.")] = False,
    limit: Annotated[int, typer.Option(help="How many rows.", min=0)] = 10,
    as_json: Json = False,
) -> None:
    """Show a data set: its counts, and rows of one split.

    Example: llmo data show newsdesk --dropped
    """
    split = "dropped" if dropped else split
    with closing(flow.connect()) as api:
        artifact = api.artifact(ref, Kind.DATASET)
        rows = api.rows(artifact.digest, split, limit=limit)

    def show() -> None:
        _show_dataset(artifact)
        columns = [name for name in (rows[0] if rows else {}) if name not in ("text", *_TOLD_BY_TEXT)]
        values = [[*(shorten(row[name], 40) for name in columns), shorten(row["text"], 80)] for row in rows]
        table(f"\n{split}", [*columns, "text"], values, empty="no rows")

    emit({"ref": artifact.ref, "card": artifact.card, "split": split, "rows": rows}, as_json, show)


@app.command("list")
def data_list(as_json: Json = False) -> None:
    """List the stored data sets.

    Example: llmo data list
    """
    with closing(flow.connect()) as api:
        found = api.artifacts(Kind.DATASET)
    rows = [(a.ref, a.card.get("task", "-"), _rows(a), size(a.size), ago(a.created_at)) for a in found]
    columns = ["data set", "task", "rows train/dev/test>", "size>", "made"]
    emit(found, as_json, lambda: table("", columns, rows, empty="no data sets; make one with: llmo data import"))


def _rows(artifact: Artifact) -> str:
    rows = artifact.card.get("rows", {})
    return "/".join(str(rows.get(split, "-")) for split in ("train", "dev", "test"))


def _show_dataset(artifact: Artifact) -> None:
    card = artifact.card
    facts = [
        ("rows", f"{card['rows']['read']} read, {_rows(artifact)} train/dev/test, {card['rows']['dropped']} dropped")
    ]
    facts += [(f"dropped: {reason.replace('_', ' ')}", str(count)) for reason, count in card["dropped"].items()]
    if "items" in card:
        facts += [("users", str(card["users"])), ("items", str(card["items"]))]
        facts += [("interactions", f"{card['interactions']}, the last two of a user held out")]
    elif "values" in card:
        facts += [("values", ", ".join(f"{name} {value:g}" for name, value in card["values"].items()))]
    elif "unanswerable" in card:
        facts += [("without an answer", str(card["unanswerable"]))]
    elif "shape" in card:
        turns = f", {card['turns']['mean']:.1f} turns on average" if "turns" in card else ""
        facts += [("shape", f"{card['shape']}, written as {card['layout']}{turns}")]
    else:
        facts += [("labels", ", ".join(f"{label} {count}" for label, count in card["labels"].items()))]
    table(f"data set {artifact.ref}", ["", ""], facts)
