"""A manifest of any length as a sequence of rows: where each line begins is kept, lines are parsed when asked for.

Ten million rows take 80 MB of disk for their places, mapped and not read, and no memory. A manifest of up to 8 MiB is
indexed anew each time; a longer one once, in the user's cache.
"""

import json
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal, overload

import numpy as np
import numpy.typing as npt

from runtime.dataset import Row, parse_row
from runtime.errors import DataError, MissingFile
from trainer.sources.cache import cached_folder

SMALL_BYTES = 8 * 2**20
"""Largest manifest whose index is not worth keeping."""
CHUNK_BYTES = 32 * 2**20
"""Of a manifest, searched for line ends at once."""
STARTS = "starts.i64"
NEWLINE, SPACE = 0x0A, 0x20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Places = npt.NDArray[np.int64]


Purpose = Literal["captions", "questions"]
"""What rows are read for: their captions, or their questions with answers (conversations too)."""


class RowSequence(Sequence[Row]):
    """A sequence that knows its length and the row at a place; places below 0 and slices are those of a list."""

    @abstractmethod
    def at(self, place: int) -> Row:
        """The row at a place from 0 on, below the length."""

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        places = range(len(self))[index]  # IndexError beyond
        return self.at(places) if isinstance(places, int) else [self.at(place) for place in places]


class ManifestRows(RowSequence):
    """Rows of a manifest; one that is wrong or has not what it is read for raises DataError when it is asked for.

    Raises:
        MissingFile: there is no such file.
        DataError: it has no line at all, or is a folder.
    """

    def __init__(self, manifest: Path, purpose: Purpose | None = None) -> None:
        if manifest.is_dir():
            raise DataError(f"{manifest}: expected a manifest file (JSON Lines), found a folder; name the file in it")
        if not manifest.is_file():
            raise MissingFile(f"{manifest}: expected a manifest (JSON Lines), found nothing under that name")
        self.path, self._purpose = manifest, purpose
        self._starts = _starts_of(manifest)
        if not len(self._starts):
            raise DataError(f"{manifest}: expected at least one row, found an empty data set")
        self._file = manifest.open("rb")
        self._size = os.fstat(self._file.fileno()).st_size

    def __len__(self) -> int:
        return len(self._starts)

    def at(self, place: int) -> Row:
        """The row of the line at `place`, parsed now."""
        start = int(self._starts[place])
        try:
            return self._fit(parse_row(self._text(place), f"{self.path}:?", self.path.parent))
        except DataError as error:
            raise DataError(str(error).replace(":?", f":{self._line_number(start)}", 1)) from error

    def _fit(self, row: Row) -> Row:
        fits = {"captions": bool(row.captions), "questions": bool((row.question and row.answers) or row.turns)}
        if self._purpose is not None and not fits[self._purpose]:
            wanted = {"captions": "captions", "questions": "a question and its answers"}[self._purpose]
            raise DataError(f"{self.path}:?: expected a row with {wanted}, found one without; leave it out of this set")
        return row

    def __iter__(self) -> Iterator[Row]:
        return (self[place] for place in range(len(self)))

    def image_ids(self) -> Iterator[str]:
        """The image id of every row, in order, without the rest of the row being looked at; "" for a wrong line."""
        with self.path.open("rb") as file:
            for line in file:
                text = line.removeprefix(BYTE_ORDER_MARK).strip()
                if text:
                    yield _image_id(text)

    def _text(self, place: int) -> str:
        start = int(self._starts[place])
        end = int(self._starts[place + 1]) if place + 1 < len(self) else self._size
        try:
            return os.pread(self._file.fileno(), end - start, start).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.path}:?: expected UTF-8 text, found other bytes; save the manifest as UTF-8"
            ) from error

    def _line_number(self, start: int) -> int:
        with self.path.open("rb") as file:
            return 1 + sum(chunk[: max(0, start - first)].count(b"\n") for first, chunk in _chunks(file))


def _image_id(line: bytes) -> str:
    try:
        record = json.loads(line)
        found = record.get("image_id")
        return str(record["image"] if found is None else found)
    except (ValueError, AttributeError, KeyError):
        return ""


def _starts_of(manifest: Path) -> Places:
    """Byte at which each line that is not blank begins."""
    if manifest.stat().st_size <= SMALL_BYTES:
        with manifest.open("rb") as file:
            found = list(_line_starts(file))
        return np.concatenate(found) if found else np.empty(0, np.int64)
    settings = {"manifest": str(manifest.absolute())}
    with cached_folder("lines", settings, [manifest], partial(_write_starts, manifest)) as folder:
        return np.memmap(folder / STARTS, np.int64, "r")


def _write_starts(manifest: Path, folder: Path) -> None:
    with manifest.open("rb") as file, (folder / STARTS).open("wb") as sink:
        for starts in _line_starts(file):
            sink.write(starts.tobytes())


def _line_starts(file: BinaryIO) -> Iterator[Places]:
    """Starts of lines, in pieces; a line of white space alone is none, and neither is a byte-order mark."""
    begins = True  # whether the chunk's first byte begins a line
    for first, chunk in _chunks(file):
        bytes_ = np.frombuffer(chunk, np.uint8)
        after = np.flatnonzero(bytes_ == NEWLINE) + 1
        skipped = len(BYTE_ORDER_MARK) if first == 0 and chunk.startswith(BYTE_ORDER_MARK) else 0
        starts = np.concatenate([[skipped], after]) if begins else after
        begins = bool(chunk[-1] == NEWLINE)
        starts = starts[starts < len(chunk)]
        doubtful = np.flatnonzero(bytes_[starts] <= SPACE)
        blank = [i for i in doubtful.tolist() if not _line_at(file, first + int(starts[i])).strip()]
        yield np.delete(starts, blank).astype(np.int64) + first


def _chunks(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    first = 0
    while chunk := os.pread(file.fileno(), CHUNK_BYTES, first):
        yield first, chunk
        first += len(chunk)


def _line_at(file: BinaryIO, start: int) -> bytes:
    file.seek(start)
    return file.readline()
