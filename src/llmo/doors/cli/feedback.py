"""Feedback: what people said of answers, listed, and exported for training."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Annotated, Literal

import typer

from llmo.api import Api
from llmo.doors import flow, preferences
from llmo.doors.cli.outfile import place
from llmo.doors.cli.show import Json, ago, console, emit, shorten, table
from llmo.errors import InputError
from llmo.files import publish
from llmo.types import Feedback

PAGE = 100
KINDS = {"pairs": preferences.pairs, "conversations": preferences.conversations}

feedback_app = typer.Typer(
    name="feedback", help="What people say of answers: list, export.", no_args_is_help=True, rich_markup_mode=None
)


def register(app: typer.Typer) -> None:
    app.add_typer(feedback_app)


@feedback_app.command("list")
def feedback_list(
    endpoint: Annotated[str | None, typer.Argument(help="Of this endpoint only.")] = None,
    after: Annotated[int, typer.Option(help="Only what came after this number.", min=0)] = 0,
    limit: Annotated[int, typer.Option(help="How many, oldest first.", min=1)] = 20,
    as_json: Json = False,
) -> None:
    """List what people said of answers.

    Example: llmo feedback list assistant
    """
    with closing(flow.connect()) as api:
        found = api.feedback(endpoint, after=after, limit=limit)
    rows = [
        (f.id, f.endpoint, f.kind, f.rating or "-", _question(f), _remark(f), f.owner or "-", ago(f.at)) for f in found
    ]
    columns = ["number>", "endpoint", "kind", "rating", "question", "said", "by", "when"]
    empty = "no feedback; people give it in the chat page, and with /rate in llmo chat"
    emit(found, as_json, lambda: table("", columns, rows, empty=empty))


def _question(feedback: Feedback) -> str:
    return shorten(str(feedback.messages[-1].get("content") or ""), 50)


def _remark(feedback: Feedback) -> str:
    return shorten(feedback.comment or feedback.correction or "", 40)


@feedback_app.command("export")
def feedback_export(
    endpoint: Annotated[str, typer.Argument(help="The endpoint whose feedback it is.")],
    jsonl: Annotated[str, typer.Option("--jsonl", metavar="FILE", help="Where to; '-' is standard output.")],
    what: Annotated[
        Literal["pairs", "conversations"],
        typer.Option(help="Preference pairs, or whole conversations that were called good or corrected."),
    ] = "pairs",
    as_json: Json = False,
) -> None:
    """Write an endpoint's feedback as lines of JSON that `llmo data import --task generation` reads.

    Example: llmo feedback export assistant --jsonl pairs.jsonl
    """
    with closing(flow.connect()) as api:
        made = KINDS[what](_all(api, endpoint))
    if not made:
        raise InputError(
            f"no feedback on '{endpoint}' makes {what} yet",
            hint="pairs come of comparisons, corrections, and good and bad answers to the same messages",
        )
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
    if jsonl == "-":
        sys.stdout.write(text)
        return
    publish(place(jsonl), text)
    shown = {"file": jsonl, "what": what, "rows": len(made)}
    emit(shown, as_json, lambda: console.print(f"{len(made)} {what} in {jsonl}", markup=False, soft_wrap=True))


def _all(api: Api, endpoint: str) -> Iterator[Feedback]:
    after = 0
    while page := api.feedback(endpoint, after=after, limit=PAGE):
        yield from page
        after = page[-1].id
