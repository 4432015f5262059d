"""The operation `part`: of a model that was trained together with other tasks, the model of one of those."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file

from llmo.context import Context
from llmo.engines.torch import quiet
from llmo.errors import ModelError
from llmo.jobspecs import PartSpec
from llmo.specfile import validate
from llmo.tasks.card import GOLDEN, load_task, read_card, write_card
from llmo.training import lineage, report, together
from llmo.training.failures import disk_errors
from llmo.training.folder import TOKENIZER_FILES
from llmo.training.model import check_loaded, load


def run(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """`spec` is `PartSpec.plain()`; `inputs` are the `model`, whose trunk is kept to the last bit, and the task's own
    `data`, for the lineage.

    Writes a model folder as training does. It is a head over the input model, as if it had been trained on it by method
    `head`: an endpoint of that model can answer with it too. Raises ModelError for a model without such a task.
    """
    name, base = validate(dict(spec), PartSpec).name, inputs["model"]
    folder = _find(base, name)
    card, task = read_card(folder), load_task(folder)
    with quiet():
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    try:
        head = load_file(folder / together.HEAD)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"the head of {name} cannot be read: {error}", where=str(folder), hint="train again"
        ) from error
    model, info = load(base, task, config, "eager")
    check_loaded(model, info, base, set(head))
    model.load_state_dict(head, strict=False)
    with disk_errors(out), quiet():
        model.save_pretrained(out)
        for path in [*(base / file for file in TOKENIZER_FILES), folder / GOLDEN]:
            if path.is_file():
                shutil.copyfile(path, out / path.name)
        if (folder / report.FOLDER).is_dir():
            shutil.copytree(folder / report.FOLDER, out / report.FOLDER)
    beneath = lineage.base_of(base)
    write_card(out, card | {"base": beneath, "method": "head", "together": {**card["together"], "by": card["method"]}})
    return {"metric": card["metric"], "parameters": card["parameters"], **card["metrics"]}


def _find(base: Path, name: str) -> Path:
    folder = base / together.FOLDER
    known = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if name not in known:
        raise ModelError(
            f"the model was not trained together with a task '{name}'",
            hint=f"it was with: {', '.join(known)}" if known else "tasks are named in `also` of llmo.yaml",
        )
    return folder / name
