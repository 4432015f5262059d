"""A data set on disk: memory-mapped Arrow files for the splits and the dropped rows, and one JSON card."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast, overload

import pyarrow as pa

from llmo.data.row import SPLITS, Dropped, Row
from llmo.data.stored import Column
from llmo.errors import DataError, NotFoundError
from llmo.files import publish_json, storage_errors

CARD = "dataset.json"
FORMAT = 1
_BATCH_ROWS = 1024
_DROPPED = pa.schema([(name, pa.string()) for name in ("id", "text", "reason", "detail", "source")])


class Rows(Sequence[Mapping[str, Any]]):
    """The rows of one split, decoded when they are asked for; slices share the mapped memory."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._batches = table.to_batches()
        self._starts = [0]
        for batch in self._batches:
            self._starts.append(self._starts[-1] + batch.num_rows)

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """Several splits of one data set as one; nothing is copied."""
        return cls(pa.concat_tables([part._table for part in parts]))

    def pick(self, numbers: Sequence[int]) -> Rows:
        """These rows, in this order."""
        return Rows(self._table.take(pa.array(numbers, type=pa.int64())))

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | Rows:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return Rows(self._table.slice(start, max(0, stop - start)))
            return Rows(self._table.take(pa.array(range(start, stop, step), type=pa.int64())))
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = bisect_right(self._starts, at) - 1
        batch, offset = self._batches[number], at - self._starts[number]
        return {name: batch.column(i)[offset].as_py() for i, name in enumerate(batch.schema.names)}

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self._batches:
            yield from batch.to_pylist()

    def column(self, name: str) -> list[Any]:
        """One column of all rows. Raises DataError when there is no such column."""
        if name not in self._table.column_names:
            raise DataError(
                f"the data set has no column '{name}'", hint="it has: " + ", ".join(self._table.column_names)
            )
        return cast("list[Any]", self._table.column(name).to_pylist())


class Dataset:
    """A data set folder, opened. `info` is its card; nothing is read into memory until it is used."""

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        self.folder = folder
        self.info = info

    @classmethod
    def open(cls, folder: Path) -> Dataset:
        """Raises NotFoundError when the folder holds no data set, DataError when its card is damaged or too new."""
        try:
            info = json.loads((folder / CARD).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(
                f"{folder} is not a data set: it has no {CARD}", hint="make one with: llmo data import SOURCE"
            ) from None
        except ValueError:
            raise DataError(f"{folder / CARD} is damaged", hint="import the data again") from None
        if not isinstance(info, dict) or info.get("format") != FORMAT:
            raise DataError(
                f"{folder / CARD} is of a format this version does not know", hint="import the data again, or upgrade"
            )
        return cls(folder, info)

    def split(self, name: str) -> Rows:
        """The rows of `train`, `dev` or `test`."""
        if name not in SPLITS:
            raise NotFoundError(f"a data set has no split '{name}'", hint=f"one of {', '.join(SPLITS)}")
        return self._read(name)

    def dropped(self) -> Rows:
        """The rows that were left out: id, text, reason, detail, source."""
        return self._read("dropped")

    def _read(self, name: str) -> Rows:
        path = self.folder / f"{name}.arrow"
        try:
            with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
                return Rows(reader.read_all())
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path} cannot be read: {error}", hint="import the data again") from error


def write(
    folder: Path,
    splits: Mapping[str, Sequence[Row]],
    dropped: Sequence[Dropped],
    info: Mapping[str, Any],
    columns: Sequence[Column],
) -> None:
    """Write a data set folder; the card comes last. Raises StorageError when the disk does not take it."""
    schema = pa.schema([(column.name, column.type) for column in columns])
    for name in SPLITS:
        records = ({column.name: column.value(row) for column in columns} for row in splits[name])
        _write_table(folder / f"{name}.arrow", records, schema)
    lost = (
        {"id": d.row.id, "text": d.row.text, "reason": d.reason.value, "detail": d.detail, "source": d.row.place}
        for d in dropped
    )
    _write_table(folder / "dropped.arrow", lost, _DROPPED)
    publish_json(folder / CARD, {"format": FORMAT, **info})


def _write_table(path: Path, records: Iterable[dict[str, Any]], schema: pa.Schema) -> None:
    with storage_errors(path), pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        rest = iter(records)
        while batch := list(islice(rest, _BATCH_ROWS)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
