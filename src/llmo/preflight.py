"""What can be known of a project before any training: its data, how much is truncated, memory, disk, the refusals."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llmo import sources
from llmo.context import Context
from llmo.data.dataset import Dataset
from llmo.data.profile import profile
from llmo.errors import SpecError
from llmo.files import publish_json
from llmo.specfile import validate
from llmo.specs import DataSpec, ProjectSpec, TaskSpec
from llmo.tasks.card import TOKENIZER, load_tokenizer
from llmo.training.base import inspect
from llmo.training.forecast import forecast

SAMPLED = 20_000  # texts tokenised: enough for a share with an error under one percent, in about a second
TOKENS_SHOWN = 40


def run(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """The operation `check`. `spec` is `{"project", "sources"}`; raises what the run itself would raise early."""
    project = validate(dict(spec["project"]), ProjectSpec)
    data = inputs.get("data")
    found = _stored(data) if data else _profiled(project.data, project.task, spec["sources"]["data"], ctx)
    folder = inputs.get("model") or _resolved(spec["sources"]["model"])
    known = inspect(folder)
    _check_length(project.task.max_length, known["max_positions"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = _tokenizer(folder, config)
    lengths = _lengths(tokenizer, found["texts"])
    rows = int(found["rows"]["train"])
    need = forecast(project.train, project.task, config, rows, float(lengths.mean()))
    limit = project.task.max_length
    result = {
        **{key: value for key, value in found.items() if key != "texts"},
        "samples": [_rendered(tokenizer, limit, sample) for sample in found["samples"][:3]],
        "tokens": {
            "mean": round(float(lengths.mean()), 1),
            "p95": int(np.percentile(lengths, 95)),
            "longest": int(lengths.max()),
            "max_length": limit,
            "truncated": round(float((lengths > limit).mean()), 4),
            "truncated_count": int((lengths > limit).sum()),
            "sampled": len(lengths),
            "texts": len(found["texts"]),
        },
        "forecast": {"memory_bytes": need.memory_bytes, "disk_bytes": need.disk_bytes, "steps": need.steps},
    }
    publish_json(out / "report.json", result)
    return result


def _check_length(length: int, limit: int | None) -> None:
    """What training would refuse after minutes of reading and downloading."""
    if limit is not None and length > limit:
        raise SpecError(
            f"max_length is {length}, but this model reads at most {limit} tokens",
            hint=f"set task.max_length to {limit} or less",
        )


def _profiled(data: DataSpec, task: TaskSpec, source: Mapping[str, Any], ctx: Context) -> dict[str, Any]:
    uploads = Path(source["uploads"]) if source.get("uploads") else None
    told = data.model_copy(update={"source": source["source"]})
    found = profile(told, task, uploads, ctx)
    return {
        "rows": found.rows,
        "labels": found.labels,
        "dropped": found.dropped,
        "duplicates": found.duplicates,
        "empty": found.empty,
        "encodings": found.encodings,
        "longest_characters": found.longest,
        "median_characters": found.median,
        "samples": found.samples,
        "notes": found.notes,
        "texts": found.texts,
    }


def _stored(folder: Path) -> dict[str, Any]:
    """The same facts of a data set that is in the store already."""
    data = Dataset.open(folder)
    texts = [text for split in ("train", "dev", "test") for text in data.split(split).column("text")]
    sizes = [len(text) for text in texts]
    dropped = data.info["dropped"]
    return {
        "rows": data.info["rows"],
        "labels": data.info["labels"],
        "dropped": dropped,
        "duplicates": sum(dropped.get(reason, 0) for reason in ("duplicate", "near_duplicate", "leak")),
        "empty": dropped.get("empty", 0),
        "encodings": data.info["encodings"],
        "longest_characters": max(sizes),
        "median_characters": int(np.median(sizes)),
        "samples": data.info["samples"],
        "notes": [],
        "texts": texts,
    }


def _resolved(source: Mapping[str, Any]) -> Path:
    scheme, _, name = str(source["source"]).partition(":")
    if scheme == "hf":
        from llmo.training import hub  # its client takes a second to import, and few models come from there

        return hub.fetch(name)
    return sources.resolve(source["source"], Path(source["uploads"]) if source.get("uploads") else None)


def _tokenizer(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    """The model's tokeniser; one that has only a slow tokeniser's files is converted, as the run will do."""
    if (folder / TOKENIZER).exists():
        return load_tokenizer(folder)
    from llmo.training.tokenizer import bring  # brings transformers, which few models need here

    with tempfile.TemporaryDirectory() as made:
        bring(folder, Path(made), config)
        return load_tokenizer(Path(made))


def _lengths(tokenizer: Tokenizer, texts: Sequence[str]) -> NDArray[np.int64]:
    """Tokens of each text, special tokens included, of an even sample when there are very many."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    step = max(1, len(texts) // SAMPLED)
    return np.array([len(found.ids) for found in tokenizer.encode_batch_fast(list(texts[::step]))])


def _rendered(tokenizer: Tokenizer, limit: int, sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample as the model will see it: its first tokens, and what it should answer."""
    tokenizer.enable_truncation(limit)
    tokens = tokenizer.encode(sample["text"]).tokens
    shown = " ".join(tokens[:TOKENS_SHOWN]) + (" …" if len(tokens) > TOKENS_SHOWN else "")
    return {"text": sample["text"], "tokens": shown, "answer": _answer(sample)}


def _answer(sample: Mapping[str, Any]) -> str:
    if "spans" in sample:
        return ", ".join(f"{s['label']}: {sample['text'][s['start'] : s['end']]}" for s in sample["spans"]) or "(none)"
    return ", ".join(sample["labels"]) if "labels" in sample else str(sample["label"])
