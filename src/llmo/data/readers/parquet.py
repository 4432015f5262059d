"""Reads Parquet; whole numbers that stand for class names (as `datasets` writes them) become those names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmo.data.encoding import opened
from llmo.data.readers.base import RawRow, ReadLog
from llmo.errors import DataError
from llmo.specs import DataSpec

_BATCH = 1024


def read(path: Path, spec: DataSpec, log: ReadLog) -> Iterator[RawRow]:
    """Rows as `{column: value}`; places are `file#row`, counted from 1."""
    where = log.name(path)
    number = 0
    with opened(path, where) as handle:
        try:
            file = pq.ParquetFile(handle)
            names = _class_names(file.schema_arrow.metadata or {})
            for batch in file.iter_batches(_BATCH):
                for values in batch.to_pylist():
                    number += 1
                    yield RawRow({k: _named(v, names.get(k)) for k, v in values.items()}, f"{where}#{number}")
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"this is not a Parquet file that can be read: {str(error).splitlines()[0]}",
                where=where,
                hint="write it again, or give the format it has: format: csv",
            ) from None


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    found = {}
    for column, feature in features.items():
        inner = feature
        while isinstance(inner, dict) and "names" not in inner and "feature" in inner:
            inner = inner["feature"]
        if isinstance(inner, dict) and isinstance(inner.get("names"), list):
            found[column] = [str(name) for name in inner["names"]]
    return found


def _named(value: Any, names: list[str] | None) -> Any:
    if names is None:
        return value
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    if isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    return None if value == -1 else value
