"""What can be known of a project before any training: its data, how much is truncated, memory, disk, the refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llmo import methods, plugins, sources
from llmo.context import Context
from llmo.data import gold
from llmo.data.dataset import Dataset
from llmo.data.profile import profile
from llmo.errors import SpecError
from llmo.files import publish_json
from llmo.jobspecs import ALSO, ScratchSpec
from llmo.specfile import validate
from llmo.specs import AlsoSpec, DataSpec, ProjectSpec, TaskSpec, TrainSpec
from llmo.tasks.base import Task
from llmo.tasks.card import TOKENIZER, load_tokenizer
from llmo.tasks.extractive_qa import ExtractiveQA
from llmo.tasks.generation import Generation, conversation
from llmo.tasks.sentence_embedding import SentenceEmbedding
from llmo.training import gguf_source, scratch
from llmo.training.base import config_of, inspect
from llmo.training.correction import correct
from llmo.training.fitting import fit, refuse
from llmo.training.forecast import Rows as Lengths
from llmo.training.forecast import forecast
from llmo.tuning.space import facts, resolve

SAMPLED = 20_000  # texts tokenised: enough for a share with an error under one percent, in about a second
CONVERSATIONS = 2_000  # the same of conversations, each of which the template writes several times
TOKENS_SHOWN = 40
Rows = Sequence[Mapping[str, Any]]


def run(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """The operation `check`. `spec` is `{"project", "sources"}` and, where they are known, the `memory` that LLMO may
    use (bytes), whether the machine computes `bf16`, and the `history` of trainings (as `correct` takes it). Raises
    what the run itself would raise early."""
    project = validate(dict(spec["project"]), ProjectSpec)
    train, task = project.train, project.task.name
    kind: type[Task] = plugins.load("llmo.tasks", task)
    methods.check(train.method, train.base_weights, task, has_head=kind.has_head)
    looks = {"data": _Look(project.task, _found("data", project, spec, inputs, ctx))}
    for also in project.also:
        key = f"{ALSO}{also.name}"
        looks[key] = _Look(also.task, _found(key, also, spec, inputs, ctx))
    first = looks["data"]
    found = first.found
    longest = max(look.task.max_length for look in looks.values())
    rows = first.rows[: found["rows"]["train"]]
    with _base(spec["sources"]["model"], inputs.get("model"), task, train, longest, rows) as (described, config):
        kind.of_base(described)
        for look in looks.values():
            look.tokenise(described)
    cut = np.concatenate([np.minimum(look.lengths, look.task.max_length) for look in looks.values()])
    train_rows = sum(int(look.found["rows"]["train"]) for look in looks.values())
    to_come = Lengths(train_rows, float(cut.mean()), int(cut.max()))
    memory, bf16 = int(spec.get("memory", 0)), bool(spec.get("bf16", True))
    parameters = forecast(project.train, project.task, config, to_come).parameters
    correction = correct(spec.get("history", []), project.train.method, parameters)
    need = fit(project.train, project.task, config, to_come, correction, bf16=bf16, memory=memory)
    refuse(need, memory)
    result = {**first.to_json(), "forecast": need}
    if project.also:
        result["also"] = {also.name: looks[f"{ALSO}{also.name}"].to_json() for also in project.also}
    if project.tune is not None:
        result["tune"] = _search(project, found, config, parameters)
    publish_json(out / "report.json", result)
    return result


class _Look:
    """At one data set: what was `found` in it, and its texts as the model will see them."""

    def __init__(self, task: TaskSpec, found: dict[str, Any]) -> None:
        self.task, self.found, self.rows = task, found, found.pop("records")
        self.lengths: NDArray[np.int64] = np.zeros(0, np.int64)

    def tokenise(self, folder: Path) -> None:
        """By the tokeniser of the base model's folder."""
        seen = _SEEN.get(self.task.name, _texts)
        self.lengths, self.found["samples"] = seen(folder, self.task, self.rows, self.found["samples"])

    def to_json(self) -> dict[str, Any]:
        lengths, limit = self.lengths, self.task.max_length
        tokens = {
            "mean": round(float(lengths.mean()), 1),
            "p95": int(np.percentile(lengths, 95)),
            "longest": int(lengths.max()),
            "max_length": limit,
            "truncated": round(float((lengths > limit).mean()), 4),
            "truncated_count": int((lengths > limit).sum()),
            "sampled": len(lengths),
            "texts": len(self.rows),
        }
        return {**self.found, "tokens": tokens}


def _found(
    key: str, one: ProjectSpec | AlsoSpec, spec: Mapping[str, Any], inputs: Mapping[str, Path], ctx: Context
) -> dict[str, Any]:
    """What is in a data set of the project, stored already or not."""
    stored = inputs.get(key)
    return _stored(stored) if stored else _profiled(one.data, one.task, spec["sources"][key], ctx)


@contextmanager
def _base(
    source: Mapping[str, Any], stored: Path | None, task: str, train: TrainSpec, max_length: int, rows: Rows
) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """The base model's folder as the run will see it, weights aside, and its config; one from scratch is made here, of
    the training rows, but for its weights."""
    check = partial(methods.check_length, train.method, train.virtual_tokens, max_length)
    if "scratch" in source:
        with TemporaryDirectory() as name:
            made = validate(dict(source["scratch"]), ScratchSpec)
            check(scratch.POSITIONS[made.architecture])
            yield Path(name), scratch.describe(made, task, scratch.texts_of(rows), Path(name))
        return
    folder = stored or _resolved(source)
    check(inspect(folder)["max_positions"])
    config = config_of(folder)
    with _described(folder, config) as described:
        yield described, config


def _search(
    project: ProjectSpec, found: Mapping[str, Any], config: Mapping[str, Any], parameters: int
) -> list[dict[str, str]]:
    """What the search would vary. Raises SpecError where its trials could not be measured."""
    if project.tune is None or (project.tune.folds is None and not found["rows"]["dev"]):
        raise SpecError(
            "a search measures its trials on dev, and the dev split is empty",
            hint="set data.split.dev above 0, or tune.folds to cross-validate",
        )
    rows, shape = int(found["rows"]["train"]), str(found["shape"])
    known = facts(project.task, project.train, rows, config, parameters, shape)
    return [{"key": one.key, "choice": one.text(), "why": one.why} for one in resolve(project.tune, known)]


def _profiled(data: DataSpec, task: TaskSpec, source: Mapping[str, Any], ctx: Context) -> dict[str, Any]:
    uploads = Path(source["uploads"]) if source.get("uploads") else None
    told = data.model_copy(update={"source": source["source"]})
    found = profile(told, task, uploads, ctx)
    return {
        "rows": found.rows,
        "labels": found.labels,
        "shape": found.shape,
        "dropped": found.dropped,
        "duplicates": found.duplicates,
        "empty": found.empty,
        "encodings": found.encodings,
        "longest_characters": found.longest,
        "median_characters": found.median,
        "samples": found.samples,
        "notes": found.notes,
        "records": found.records,
    }


def _stored(folder: Path) -> dict[str, Any]:
    """The same facts of a data set that is in the store already."""
    data = Dataset.open(folder)
    rows = [row for split in ("train", "dev", "test") for row in data.split(split)]
    sizes = [len(row["text"]) for row in rows]
    dropped = data.info["dropped"]
    return {
        "rows": data.info["rows"],
        "labels": data.info["labels"],
        "shape": data.info.get("shape", ""),
        "dropped": dropped,
        "duplicates": sum(dropped.get(reason, 0) for reason in ("duplicate", "near_duplicate", "leak")),
        "empty": dropped.get("empty", 0),
        "encodings": data.info["encodings"],
        "longest_characters": max(sizes),
        "median_characters": int(np.median(sizes)),
        "samples": data.info["samples"],
        "notes": [],
        "records": rows,
    }


def _resolved(source: Mapping[str, Any]) -> Path:
    scheme, _, name = str(source["source"]).partition(":")
    if scheme == "hf":
        from llmo.training import hub  # its client takes a second to import, and few models come from there

        return hub.fetch(name)
    return sources.resolve(source["source"], Path(source["uploads"]) if source.get("uploads") else None)


@contextmanager
def _described(folder: Path, config: Mapping[str, Any]) -> Iterator[Path]:
    """The folder as the run will see it, weights aside: a slow tokeniser converted, a GGUF file's own taken out."""
    file = gguf_source.find(folder)
    if file is None and (folder / TOKENIZER).exists():
        yield folder
        return
    with TemporaryDirectory() as name:
        made = Path(name)
        if file is not None:
            gguf_source.tokenizer(file, made)
            (made / "config.json").write_text(json.dumps(config), encoding="utf-8")
        else:
            from llmo.training.tokenizer import bring  # brings transformers, which few models need here

            for path in folder.glob("*.j*"):  # configs and a chat template
                (made / path.name).write_bytes(path.read_bytes())
            bring(folder, made, config)
        yield made


def _texts(folder: Path, task: TaskSpec, rows: Rows, samples: Rows) -> tuple[NDArray[np.int64], list[dict[str, Any]]]:
    """Tokens of each text, special tokens included, of an even sample when there are very many; and the samples as
    the model will see them."""
    tokenizer = load_tokenizer(folder)
    step = max(1, len(rows) // SAMPLED)
    found = tokenizer.encode_batch_fast([row["text"] for row in rows[::step]])
    tokenizer.enable_truncation(task.max_length)
    shown = [
        {"text": s["text"], "tokens": _shown(tokenizer.encode(s["text"]).tokens), "answer": gold.told(s)}
        for s in samples[:3]
    ]
    return np.array([len(one.ids) for one in found]), shown


def _conversations(
    folder: Path, task: TaskSpec, rows: Rows, samples: Rows
) -> tuple[NDArray[np.int64], list[dict[str, Any]]]:
    """As `_texts`; a sample is what the model's own template makes of the question, and the answer it should learn."""
    tokenizer = load_tokenizer(folder)
    made = Generation.from_rows(rows, max_length=task.max_length, options=Generation.of_base(folder))
    some = list(rows[:: max(1, len(rows) // CONVERSATIONS)])
    lengths = np.array([encoding.length for encoding in made.encode_rows(tokenizer, some)])
    shown = []
    for row in rows[:3]:
        rendered, ids = made.question(tokenizer, row)
        answer = (conversation(row)[0] or [{"content": row["text"][len(rendered) :]}])[-1]["content"]
        shown.append({"text": rendered, "tokens": _written(tokenizer, ids), "answer": str(answer)})
    return lengths, shown


def _paired(folder: Path, task: TaskSpec, rows: Rows, samples: Rows) -> tuple[NDArray[np.int64], list[dict[str, Any]]]:
    """As `_texts`, of each sequence that rows of two texts are read as."""
    tokenizer = load_tokenizer(folder)
    made: Task = plugins.load("llmo.tasks", task.name).from_rows(rows, max_length=task.max_length, options={})
    encodings = made.encode_rows(tokenizer, list(rows[:: max(1, len(rows) // SAMPLED)]))
    lengths = np.array([part.length for encoding in encodings for part in encoding.apart()])
    shown = []
    for row, encoding in zip(rows[:3], made.encode_rows(tokenizer, list(rows[:3])), strict=True):
        tokens = [str(tokenizer.id_to_token(i)) for i in encoding.input_ids]
        shown.append({"text": row["text"], "tokens": _shown(tokens), "answer": gold.told(row)})
    return lengths, shown


_SEEN = {
    Generation.name: _conversations,
    ExtractiveQA.name: _paired,
    SentenceEmbedding.name: _paired,
}


def _written(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return json.dumps(tokenizer.decode(list(ids), skip_special_tokens=False), ensure_ascii=False)


def _shown(tokens: Sequence[str]) -> str:
    return " ".join(tokens[:TOKENS_SHOWN]) + (" …" if len(tokens) > TOKENS_SHOWN else "")
