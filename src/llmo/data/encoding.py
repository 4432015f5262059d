"""Finds the character encoding of a file and opens it as text, with memory bounded whatever the file is."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

import charset_normalizer

from llmo.data.readers.base import MAX_CELL, ReadLog
from llmo.data.scripts import ranked
from llmo.errors import DataError

_CHUNK = 1 << 20
_HEAD = 1 << 16
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16: its mark begins with the same two bytes
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MAGIC = (
    (b"PK\x03\x04", "a ZIP file (an Excel sheet is one too)", "unpack it, or save the sheet as CSV UTF-8"),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word file", "save it as CSV UTF-8"),
    (b"\x1f\x8b", "a gzip file", "unpack it first: gunzip FILE"),
    (b"BZh", "a bzip2 file", "unpack it first: bunzip2 FILE"),
    (b"\xfd7zXZ", "an xz file", "unpack it first: unxz FILE"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it first: unzstd FILE"),
    (b"PAR1", "a Parquet file", "name it .parquet, or say format: parquet"),
    (b"%PDF", "a PDF file", "extract its text first"),
    (b"\x89PNG", "a PNG image", "give a text file"),
    (b"\xff\xd8\xff", "a JPEG image", "give a text file"),
    (b"SQLite format 3", "an SQLite database", "export the table as CSV"),
)
_CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
_STRAY = "llmo-stray-bytes"


def _stray(error: UnicodeError) -> tuple[str, int]:
    """A byte that its encoding does not define is read as Windows-1252, as browsers do."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    raw = error.object[error.start : error.end]
    return "".join(bytes([b]).decode("cp1252", "ignore") or chr(b) for b in raw), error.end


codecs.register_error(_STRAY, _stray)


@dataclass(frozen=True, slots=True)
class Encoding:
    """A Python codec, how its errors are met, and the name the user reads."""

    codec: str
    errors: str = "strict"

    @property
    def name(self) -> str:
        return f"{self.codec} with stray bytes" if self.codec == "utf-8" and self.errors != "strict" else self.codec


def detect(path: Path, told: str, where: str) -> Encoding:
    """The encoding of a file: `told` unless that is "auto". Raises DataError for a binary file or unknown name."""
    if told != "auto":
        return _told(told, where)
    with opened(path, where) as file:
        head = file.read(_HEAD)
        certain = _by_mark(head, where)
        if certain is not None:
            return certain
        file.seek(0)
        if _decodes(file, Encoding("utf-8")):
            return Encoding("utf-8")
        file.seek(0)
        sample = _sample(file)
        for candidate in _candidates(sample):
            file.seek(0)
            if _decodes(file, candidate):
                return candidate
    return Encoding("cp1252", _STRAY)


@contextmanager
def opened(path: Path, where: str) -> Iterator[BinaryIO]:
    """The file's bytes; the operating system's refusals become DataErrors that name `where`."""
    try:
        with open(path, "rb") as file:
            yield file
    except PermissionError:
        raise DataError("no permission to read this file", where=where, hint=f"chmod u+r {where}") from None
    except FileNotFoundError:
        raise DataError("the file is gone", where=where, hint="give a path that exists") from None
    except IsADirectoryError:
        raise DataError(
            "this is a folder, not a file", where=where, hint="leave out `format`, or name a file"
        ) from None


@contextmanager
def open_text(path: Path, told: str, log: ReadLog) -> Iterator[TextIO]:
    """The file as text with `\\n` line ends; its encoding is counted in the log.

    Raises DataError for an empty or binary file, and, while it is read, for bytes that the encoding forbids.
    """
    where = log.name(path)
    encoding = detect(path, told, where)
    with opened(path, where) as file:
        if not file.read(1):
            raise DataError("the file is empty", where=where, hint="give a file with at least a few rows")
        file.seek(0)
        text = io.TextIOWrapper(file, encoding=encoding.codec, errors=encoding.errors)
        log.encodings[encoding.name] += 1
        try:
            yield text
        except UnicodeDecodeError as error:
            raise _undecodable(error, encoding, where) from None


def read_text(path: Path, told: str, log: ReadLog) -> str:
    """A whole small file as text. Raises DataError when it is longer than a text may be."""
    where = log.name(path)
    with opened(path, where) as file:
        data = file.read(4 * MAX_CELL + 1)
    if len(data) > 4 * MAX_CELL:
        raise too_long(where)
    encoding = Encoding("utf-8")
    text = _plain_utf8(data) if told == "auto" else None
    if text is None:
        encoding = detect(path, told, where)
        try:
            text = data.decode(encoding.codec, encoding.errors)
        except UnicodeDecodeError as error:
            raise _undecodable(error, encoding, where) from None
    log.encodings[encoding.name] += 1
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _plain_utf8(data: bytes) -> str | None:
    """The quick way for what most small files are."""
    if b"\x00" in data or data.startswith(codecs.BOM_UTF8):
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def lines(file: TextIO, where: str) -> Iterator[tuple[int, str]]:
    """Numbered lines from 1, each with its `\\n`. Raises DataError for one longer than a text may be."""
    number = 0
    while line := file.readline(MAX_CELL + 1):
        number += 1
        if len(line) > MAX_CELL:
            raise too_long(f"{where}:{number}")
        yield number, line


def too_long(where: str) -> DataError:
    return DataError(
        f"more than {MAX_CELL:,} characters in one text or line",
        where=where,
        hint="divide it into documents, or mend the line ends or quotes of the file",
    )


def _told(name: str, where: str) -> Encoding:
    try:
        return Encoding(codecs.lookup(name).name)
    except LookupError:
        raise DataError(
            f"unknown encoding '{name}'", where=where, hint="write e.g. utf-8, cp1252, gb18030, shift_jis, or auto"
        ) from None


def _by_mark(head: bytes, where: str) -> Encoding | None:
    for mark, codec in _BOMS:
        if head.startswith(mark):
            return Encoding(codec)
    for magic, what, hint in _MAGIC:
        if head.startswith(magic):
            raise DataError(f"this is {what}, not text", where=where, hint=hint)
    if b"\x00" in head:
        wide = _utf16_without_mark(head)
        if wide is None:
            raise _binary(where, "it has NUL bytes")
        return wide
    controls = len(_CONTROLS.findall(head))
    if controls > 8 and controls > len(head) // 100:
        raise _binary(where, "it is full of control characters")
    return None


def _binary(where: str, why: str) -> DataError:
    return DataError(f"this is a binary file, not text: {why}", where=where, hint="export the data as UTF-8 text")


def _utf16_without_mark(head: bytes) -> Encoding | None:
    even, odd = head[0::2].count(0), head[1::2].count(0)
    half = len(head) // 2
    if odd > 0.4 * half and even < 0.01 * half:
        return Encoding("utf-16-le")
    if even > 0.4 * half and odd < 0.01 * half:
        return Encoding("utf-16-be")
    return None


def _decodes(file: BinaryIO, encoding: Encoding) -> bool:
    decoder = codecs.getincrementaldecoder(encoding.codec)(encoding.errors)
    try:
        while chunk := file.read(_CHUNK):
            decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _sample(file: BinaryIO) -> bytes:
    """The first lines that are not ASCII, 64 KiB of them: what the decision rests on."""
    kept: list[bytes] = []
    size = 0
    while size < _HEAD and (chunk := file.readline(_HEAD)):
        if not chunk.isascii():
            kept.append(chunk)
            size += len(chunk)
    return b"".join(kept)


def _candidates(sample: bytes) -> Iterator[Encoding]:
    if _mostly_utf8(sample):
        yield Encoding("utf-8", _STRAY)
    for codec, score in ranked(sample):
        if score >= 0.5:
            yield Encoding(codec, _STRAY if codec == "cp1252" else "strict")
    guess = charset_normalizer.from_bytes(sample).best()
    if guess is not None:
        yield Encoding(guess.encoding)


def _mostly_utf8(sample: bytes) -> bool:
    good = len(re.findall(rb"[\xc3-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}", sample))
    bad = sample.decode("utf-8", "replace").count("\ufffd")
    return good >= 10 * bad


def _undecodable(error: UnicodeDecodeError, encoding: Encoding, where: str) -> DataError:
    byte = error.object[error.start]
    return DataError(
        f"byte 0x{byte:02x} is not {encoding.codec}", where=where, hint="leave out `encoding` to have it detected"
    )
