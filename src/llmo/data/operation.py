"""The operation `import`: a raw source becomes a clean, divided, memory-mapped data set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmo import sources, specfile
from llmo.context import Context
from llmo.data import dataset
from llmo.data.build import build
from llmo.errors import DataError
from llmo.specs import DataSpec, TaskSpec


def run(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """`spec` is `DataSpec.plain()` with `task`, `source_digest` and `uploads`. Returns the card without samples."""
    data = specfile.validate({k: v for k, v in spec.items() if k in DataSpec.model_fields}, DataSpec, "data")
    task = specfile.validate(spec["task"], TaskSpec, "task")
    uploads = spec.get("uploads")
    source = sources.resolve(data.source, Path(uploads) if uploads else None)
    digest = _unchanged(source, spec.get("source_digest"))
    built = build(source, data, task, ctx)
    for note in built.notes:
        ctx.note(note)
    info = {"source": data.source, "source_digest": digest, **built.info}
    card = {**info, "samples": built.samples}
    dataset.write(out, built.splits, built.dropped, card, built.stored)
    ctx.report(info["rows"]["read"], info["rows"]["read"], phase="written")
    return info


def _unchanged(source: Path, promised: str | None) -> str:
    digest = sources.fingerprint(source)
    if promised is not None and digest != promised:
        raise DataError(
            "the source has changed since this was submitted",
            where=source.name,
            hint="run it again: what is imported must be what was planned",
        )
    return digest
