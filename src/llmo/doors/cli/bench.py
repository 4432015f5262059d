"""`llmo bench`: an endpoint under load, beside the plain transformers pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from llmo.api import Api
from llmo.doors import flow
from llmo.doors.cli.given import lines_of, one_asked
from llmo.doors.cli.show import Json, console, emit, seconds, size, table
from llmo.errors import InputError
from llmo.types import Asked

MOST_CLIENTS = 1024


def register(app: typer.Typer) -> None:
    app.command()(bench)


def bench(
    endpoint: Annotated[str, typer.Argument(help="An endpoint over an encoder, or a further model as ENDPOINT:NAME.")],
    clients: Annotated[str, typer.Option(help="Numbers of clients, each with one request in flight.")] = "1,16,64",
    length: Annotated[
        float, typer.Option("--seconds", help="Seconds of load at each number of clients.", min=1.0, max=3600.0)
    ] = 10.0,
    texts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DATA",
            help="A file with one text a line (.jsonl: objects of texts), or a stored data set; default: held-out rows "
            "of the data that the model was trained on.",
        ),
    ] = None,
    pipeline: Annotated[
        bool, typer.Option("--pipeline/--no-pipeline", help="Measure the plain transformers pipeline beside it.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Load an endpoint over HTTP: requests a second, latency, memory, cold start, share of the machine's peak.

    Example: llmo bench newsdesk --clients 1,16
    """
    from llmo.doors import benching  # with the HTTP stack

    plan = benching.Plan(_numbers(clients), length, pipeline)
    with closing(flow.connect()) as api, _progress(as_json) as progress:
        task = progress.add_task("looking", total=None)
        subject = benching.subject(api, endpoint)
        source, asked = _texts(api, subject, texts)
        found = benching.bench(
            api, subject, asked, plan,
            lambda what, done, total: progress.update(
                task, description=what, completed=done, total=total if done else None
            ),
        )  # fmt: skip
    found["texts"]["source"] = source
    emit(found, as_json, lambda: _show(found))


def _numbers(clients: str) -> list[int]:
    try:
        found = [int(number) for number in clients.split(",")]
    except ValueError:
        found = []
    if not found or not all(1 <= number <= MOST_CLIENTS for number in found) or len(set(found)) < len(found):
        raise InputError(
            f"'{clients}' is no list of numbers of clients",
            where="--clients",
            hint=f"different whole numbers from 1 to {MOST_CLIENTS}, as in: --clients 1,16,64",
        )
    return found


def _texts(api: Api, subject: Any, given: str | None) -> tuple[str, list[Asked]]:
    from llmo.doors import benching

    if given is None or not Path(given).is_file():
        source: tuple[str, list[Asked]] = benching.texts_of(api, subject, given)
        return source
    found: list[Asked] = [*lines_of(Path(given))]
    if given.endswith(".jsonl"):
        found = [one_asked(str(line)) for line in found]
    if not found:
        raise InputError("there is no text in it", where=given, hint="one text a line")
    return given, found[: benching.MOST_TEXTS]


def _progress(as_json: bool) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        refresh_per_second=2,  # it takes its time from the cores that are measured
        disable=as_json or not console.is_terminal,
    )


def _show(found: Mapping[str, Any]) -> None:
    texts, sides = found["texts"], found["sides"]
    times = {one["clients"]: f"{one['times']:.1f}x" for one in found["times"]}
    rows = [
        (
            level["clients"], name, f"{level['requests_per_second']:.0f}",
            times.get(level["clients"], "") if name == "endpoint" else "",
            *(_ms(level[f"p{part}_ms"]) for part in (50, 95, 99)), level["failed"],
        )
        for level_number in range(len(sides["endpoint"]["levels"]))
        for name, level in ((name, side["levels"][level_number]) for name, side in sides.items())
    ]  # fmt: skip
    cores = found["cores"]
    runs = f"{found['model']}, {found['engine']} {found['precision']} on {cores} core{'s' if cores > 1 else ''}"
    table(
        f"{found['endpoint']} ({runs}); {texts['count']} texts of {texts['mean_tokens']:.0f} tokens "
        f"at the mean, {texts['source']}",
        ["clients>", "", "requests/s>", "times>", "p50 ms>", "p95 ms>", "p99 ms>", "failed>"],
        rows,
    )
    for name, side in sides.items():
        held = ", ".join(f"{who} {size(count)}" for who, count in side["memory_bytes"].items() if count is not None)
        start = f"cold start {seconds(side['cold_start_seconds'])}"
        console.print(f"{name}: {', '.join(part for part in (held, start) if part)}", markup=False)
    if (peak := found["peak"]) is not None:
        whole, one = peak["operations_per_second"] / 1e9, peak["operations_per_text"] / 1e9
        console.print(
            f"{peak['share']:.0%} of the measured peak, {whole:.0f} billion {found['precision']} operations a second "
            f"({one:.2f} billion a text)",
            markup=False,
        )
    for what, why in found["left_out"].items():
        console.print(f"left out: {what}: {why}", markup=False)
    load = max(level["load_us"] or 0.0 for side in sides.values() for level in side["levels"])
    console.print(f"the load itself took at most {load:.0f} us of CPU a request", markup=False)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
