"""What lies beside a graph in an exported folder: its runner, its golden answers, and a manifest of all of it."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmo import __version__
from llmo.compression.edge import frame, kinds
from llmo.engines.folder import pad_token_id, read_config
from llmo.engines.onnx import GRAPH
from llmo.files import MANIFEST, manifest_of, publish, publish_json
from llmo.tasks.base import Task
from llmo.tasks.card import CARD, GOLDEN, TOKENIZER

RUNNER, BUNDLE = "run.py", "bundle.json"
FORMAT = 1
EXACT, LOSSY = 1e-3, 0.05  # by which a probability may differ on another machine: at fp32, and below it
LOSSY_SHARE = 0.8  # of the golden texts; a replica's own test has the same
REQUIREMENTS = "onnxruntime>=1.23\ntokenizers>=0.22\n"
_PLACE = "TASK = Task  # the task of this model stands here\n"
_README = """\
# {model}

{task}, {precision}, in {bytes}. Needs Python 3.11 or newer and what requirements.txt names, which takes no torch:

    python3 -m venv .venv && .venv/bin/pip install -r requirements.txt
    .venv/bin/python run.py --check
    .venv/bin/python run.py {example}
    .venv/bin/python run.py --file {file} > answers.jsonl
    .venv/bin/python run.py --serve --port 8080     # POST /predict, GET /health

Answers are those of the model's LLMO endpoint. Every start compares all files with manifest.json and refuses what is
changed, missing or does not belong there (names that begin with a dot may), with exit code 3. `--check` and `--serve`
also answer the texts of golden.json, which are rows of the data the model was made with. The HTTP mode has no password:
keep it on 127.0.0.1, or behind something that has one.
"""
_EXAMPLES = {
    "extractive-qa": ("""--jsonl '{"question": "...", "context": "..."}'""", "questions.jsonl --jsonl"),
}


def runner(task: str) -> str:
    """The source of `run.py` for a task: the frame that all share, and the one class that knows this task."""
    source = Path(frame.__file__).read_text(encoding="utf-8")
    kind = kinds.TASKS[task]
    return source.replace(_PLACE, f"{inspect.getsource(kind)}\n\nTASK = {kind.__name__}\n")


def write_edge(
    folder: Path, model: Path, task: Task, precision: str, name: str, golden: Sequence[Mapping[str, Any]]
) -> None:
    """All but the graph and the manifest. `golden` is `[{"asked", "answer"}]`, as the graph answers it here."""
    shutil.copyfile(model / TOKENIZER, folder / TOKENIZER)
    exact = precision == "fp32"
    about = {
        "format": FORMAT,
        "model": name,
        "task": task.to_card(),
        "precision": precision,
        "pad_token_id": pad_token_id(read_config(model)),
        "tolerance": (EXACT if exact else LOSSY) * _unit(task),
        "share": 1.0 if exact else LOSSY_SHARE,
    }
    publish_json(folder / BUNDLE, about)
    publish_json(folder / GOLDEN, list(golden))
    publish(folder / RUNNER, runner(task.name))
    publish(folder / "requirements.txt", REQUIREMENTS)
    example, file = _EXAMPLES.get(task.name, ('"a text" "another"', "texts.txt"))
    size = f"{(folder / GRAPH).stat().st_size / 1e6:.1f} MB"
    told = {"model": name, "task": task.name, "precision": precision, "bytes": size, "example": example, "file": file}
    publish(folder / "README.md", _README.format(**told))


def copy_plain(folder: Path, model: Path) -> None:
    """What other runtimes read beside a graph: the config and the tokeniser's files, none of the data."""
    for path in sorted(model.iterdir()):
        known = path.suffix in (".json", ".txt", ".jinja") and ".index." not in path.name
        if known and path.name not in (CARD, GOLDEN, MANIFEST):
            shutil.copyfile(path, folder / path.name)


def write_manifest(folder: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write `manifest.json`: `about`, and the size and SHA-256 of every other file. Returns it.

    Its last line is the SHA-256 of all that stands before it, so that it answers for itself as well.
    """
    files = {
        name: {"size": known["size"], "sha256": known["sha256"].removeprefix("sha256:")}
        for name, known in manifest_of(folder).items()
    }
    body = {"format": FORMAT, "made_by": f"llmo {__version__}", **about, "files": files}
    head = json.dumps(body, indent=1, ensure_ascii=False).removesuffix("\n}") + ",\n "
    own = hashlib.sha256(head.encode()).hexdigest()
    publish(folder / MANIFEST, f'{head}"sha256": "{own}"\n}}\n')
    return body | {"sha256": own}


def _unit(task: Task) -> float:
    """What stands for a probability of 1 in this task's answers."""
    match task.name:
        case "regression":
            return float(task.options()["std"])
        case "sentence-embedding":
            return 0.1  # the components of a vector of length 1 are small
    return 1.0
