"""`llmo judge`: which of two endpoints answers better, by the verdict of a third."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from llmo.doors import flow
from llmo.doors.cli.chat import Settings
from llmo.doors.cli.given import Data, assignments
from llmo.doors.cli.outfile import place
from llmo.doors.cli.show import Json, console, emit, figure, table
from llmo.files import publish


def register(app: typer.Typer) -> None:
    app.command()(judge)


def judge(
    first: Annotated[str, typer.Argument(help="An endpoint, or one of its adapters as ENDPOINT:NAME.")],
    second: Annotated[str, typer.Argument(help="What it is compared with.")],
    by: Annotated[str, typer.Option(help="The endpoint that judges; a larger model judges better.")],
    data: Data = None,
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "test",
    rows: Annotated[int, typer.Option(help="How many questions.", min=1)] = 32,
    criterion: Annotated[str, typer.Option(help="What counts most, in a sentence.")] = "",
    reference: Annotated[bool, typer.Option(help="Show the judge the answer that the data holds.")] = True,
    settings: Settings = None,
    jsonl: Annotated[str | None, typer.Option("--jsonl", metavar="FILE", help="Write every pair here.")] = None,
    as_json: Json = False,
) -> None:
    """Let a third endpoint judge which of two answers better, each pair in both orders.

    Example: llmo judge assistant assistant-base --by large --rows 50
    """
    from llmo.doors import judging  # with the HTTP stack

    file = place(jsonl) if jsonl is not None else None
    match = judging.Match(first, second, by, assignments(settings), criterion, reference)
    with closing(flow.connect()) as api, _progress(as_json) as progress:

        def watch(judged: Iterable[Any], total: int) -> Iterable[Any]:
            return progress.track(judged, total=total, description="judging")

        judged = judging.contest(api, match, data=data, split=split, rows=rows, watch=watch)
    found = judging.result(match, judged)
    if file is not None:
        publish(file, "".join(judging.line(one) for one in judged))
    emit(found, as_json, lambda: _show(found))


def _progress(as_json: bool) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=as_json or not console.is_terminal,
    )


def _show(found: Mapping[str, Any]) -> None:
    rate, agreed = found["win_rate"], found["consistency"]
    table(
        f"{found['first']} against {found['second']}, judged by {found['by']}",
        ["questions>", "wins>", "losses>", "ties>", "win rate>", "same in both orders>"],
        [(found["questions"], found["wins"], found["losses"], found["ties"], figure(rate), figure(agreed))],
    )
    if found["left_out"]:
        console.print(f"{found['left_out']} were refused by an endpoint and left out", markup=False)
    better = found["first"] if rate["low"] > 0.5 else found["second"] if rate["high"] < 0.5 else None
    console.print(f"{better} is better" if better else "no difference can be told from this many", markup=False)
    if agreed["value"] < 0.5:
        console.print("the judge mostly chose by place: let a larger model judge", markup=False)
