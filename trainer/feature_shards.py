"""Rows of one size on the disk, found by a digest: append-only shards that many processes fill and read at once.

    FOLDER/<name>.rows     rows one after the other: digest (16 bytes), CRC-32 (4), filler (12), then the values
    FOLDER/<name>.index    the digests (16 bytes each) of the same rows, so that opening reads little

One process appends to a shard at a time (a lock that dies with it), the row before its digest; a row that another
process made known in between is taken out again before its digest is written. Whatever a killed writer
left half-written, a row without digest or a piece of either, is cut off by the next one that takes the shard, and
readers count only what is there whole. After a power failure a digest may stand for a row that never reached the disk:
the checksum tells, and the row counts as absent. So nothing needs to be flushed to the disk.

Rows are read by position and not mapped: a file that is cut short under a reader is then a row that is absent and no
crash, and what was read does not count as memory of this process. In memory an entry takes 16 bytes: five million
images 80 MB.
"""

import fcntl
import os
import secrets
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt

DIGEST_BYTES = 16
HEADER_BYTES = 32
SHARD_BYTES = 4 * 2**30
"""A shard beyond this is left, and another begun."""
OPEN_FILES = 64
"""Shards kept open for reading."""
MERGE_AT = 50_000
"""New entries that wait in a dictionary before they are sorted among the others."""
ROWS, INDEX = ".rows", ".index"

Rows = npt.NDArray[np.float16]
Keys = npt.NDArray[np.uint64]
Wanted = Callable[[Sequence[bytes]], AbstractContextManager[Sequence[int]]]
"""Places in some digests, to be written while the context is held."""


def _all(digests: Sequence[bytes]) -> AbstractContextManager[Sequence[int]]:
    return nullcontext(range(len(digests)))


class ShardReader:
    """Finds rows by digest among all shards of a folder. For one thread."""

    def __init__(self, folder: Path, row_bytes: int) -> None:
        self._folder, self._row_bytes = folder, row_bytes
        self._shards = list[str]()
        self._seen = list[int]()
        self._keys = np.empty(0, np.uint64)
        """First halves of the digests, sorted; equal ones by age."""
        self._places = np.empty(0, np.uint64)
        """Of the same entries: number of the shard (upper half), row in it (lower half)."""
        self._new = dict[int, int]()
        """The same for entries that came since they were sorted."""
        self._open = OrderedDict[int, int]()
        self.refresh()

    def __len__(self) -> int:
        return len(self._keys) + len(self._new)

    def refresh(self) -> int:
        """Take in what any process appended since the last look; how many entries that were."""
        known = {name: number for number, name in enumerate(self._shards)}
        found = [(np.empty(0, np.uint64), np.empty(0, np.uint64))]
        for index in sorted(self._folder.glob(f"*{INDEX}")):
            if index.stem not in known:
                known[index.stem] = len(self._shards)
                self._shards.append(index.stem)
                self._seen.append(0)
            found.append(self._new_in(known[index.stem], index))
        keys, places = (np.concatenate(columns) for columns in zip(*found, strict=True))
        self._new.update(zip(keys[:MERGE_AT].tolist(), places[:MERGE_AT].tolist(), strict=True))
        if len(self._new) >= MERGE_AT:
            self._merge(keys[MERGE_AT:], places[MERGE_AT:])
        return len(keys)

    def read(self, digests: Sequence[bytes], out: Rows) -> npt.NDArray[np.bool_]:
        """Fill out[b] with the row of digest b where there is one; tells where."""
        wanted = np.array([_key(digest) for digest in digests], np.uint64)
        starts, ends = np.searchsorted(self._keys, wanted, "left"), np.searchsorted(self._keys, wanted, "right")
        found = np.zeros(len(digests), np.bool_)
        for b, digest in enumerate(digests):
            recent = self._new.get(int(wanted[b]))
            older = self._places[starts[b] : ends[b]][::-1].tolist()
            places = older if recent is None else [recent, *older]
            found[b] = any(self._read(place, digest, out[b]) for place in places)
        return found

    def has(self, digests: Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """Where there is an entry of the same first half; its row is not looked at."""
        wanted = np.array([_key(digest) for digest in digests], np.uint64)
        counts = np.searchsorted(self._keys, wanted, "right") - np.searchsorted(self._keys, wanted, "left")
        return (counts > 0) | np.array([key in self._new for key in wanted.tolist()], np.bool_)

    def close(self) -> None:
        """Let go of the files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _new_in(self, shard: int, index: Path) -> tuple[Keys, Keys]:
        """Keys and places of the digests of one shard that were not seen yet, their rows being there whole."""
        first, rows = self._seen[shard], whole_rows(self._folder / self._shards[shard], self._row_bytes)
        with index.open("rb") as file:
            file.seek(first * DIGEST_BYTES)
            content = file.read(max(0, rows - first) * DIGEST_BYTES)
        keys = np.frombuffer(content[: len(content) // DIGEST_BYTES * DIGEST_BYTES], "<u8")[::2]
        self._seen[shard] = first + len(keys)
        return keys, np.arange(first, first + len(keys), dtype=np.uint64) + np.uint64(shard << 32)

    def _merge(self, keys: Keys, places: Keys) -> None:
        """Sort the new entries, and these newer ones, behind the older ones of the same key."""
        count = len(self._new)
        keys = np.concatenate([self._keys, np.fromiter(self._new.keys(), np.uint64, count), keys])
        places = np.concatenate([self._places, np.fromiter(self._new.values(), np.uint64, count), places])
        order = np.argsort(keys, kind="stable")
        self._keys, self._places = keys[order], places[order]
        self._new.clear()

    def _read(self, place: int, digest: bytes, out: Rows) -> bool:
        """One row into `out`, if it is that digest's and undamaged."""
        header = bytearray(HEADER_BYTES)
        values = out.view(np.uint8).data
        try:
            read = os.preadv(self._file(place >> 32), [header, values], (place & 0xFFFFFFFF) * self._row_bytes)
        except FileNotFoundError:  # someone removed the shard
            return False
        whole = read == self._row_bytes and header[:DIGEST_BYTES] == digest
        return whole and int.from_bytes(header[16:20], "little") == zlib.crc32(values)

    def _file(self, shard: int) -> int:
        """The shard, open for reading; the one that was not used for longest is closed for it."""
        if shard not in self._open:
            if len(self._open) >= OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            name = self._folder / (self._shards[shard] + ROWS)
            self._open[shard] = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        self._open.move_to_end(shard)
        return self._open[shard]


class ShardWriter:
    """Appends rows to a shard that no other living process appends to."""

    def __init__(self, folder: Path, row_bytes: int) -> None:
        self._folder, self._row_bytes = folder, row_bytes
        self._files: tuple[int, int] | None = None
        self._rows = 0

    def append(self, digests: Sequence[bytes], rows: Rows, wanted: Wanted = _all) -> int:
        """Add rows, and make known those of them that are then `wanted`; tells how many.

        OSError (a full disk, most likely) leaves the shard as it was before.
        """
        if self._files is None or self._rows * self._row_bytes >= SHARD_BYTES:
            self.close()
            self._files, self._rows = self._take()
        data, index = self._files
        try:
            for place, (digest, row) in enumerate(zip(digests, rows, strict=True)):
                self._write_row(data, self._rows + place, digest, row)
            with wanted(digests) as kept:
                if len(kept) < len(digests):
                    for place, b in enumerate(kept):
                        self._write_row(data, self._rows + place, digests[b], rows[b])
                    os.ftruncate(data, (self._rows + len(kept)) * self._row_bytes)
                _write_at(index, b"".join(digests[b] for b in kept), self._rows * DIGEST_BYTES)
        except OSError:
            self._cut(data, index, self._rows)
            raise
        self._rows += len(kept)
        return len(kept)

    def _write_row(self, data: int, place: int, digest: bytes, row: Rows) -> None:
        values = np.ascontiguousarray(row).view(np.uint8).data
        header = digest + zlib.crc32(values).to_bytes(4, "little")
        _write_at(data, header.ljust(HEADER_BYTES, b"\0"), place * self._row_bytes)
        _write_at(data, values, place * self._row_bytes + HEADER_BYTES)

    def close(self) -> None:
        """Let go of the shard; another writer may go on with it."""
        if self._files is not None:
            for descriptor in self._files:
                os.close(descriptor)
            self._files = None

    def _take(self) -> tuple[tuple[int, int], int]:
        """A shard whose writer ended, cut to its whole rows, or a new one; and how many rows it has."""
        for index in sorted(self._folder.glob(f"*{INDEX}")):
            shard = index.with_suffix("")
            rows = whole_rows(shard, self._row_bytes)
            if rows * self._row_bytes < SHARD_BYTES and (files := _lock(shard)) is not None:
                rows = whole_rows(shard, self._row_bytes)
                self._cut(*files, rows)
                return files, rows
        while (files := _lock(self._folder / secrets.token_hex(8))) is None:
            pass  # another writer took the new shard first
        return files, 0

    def _cut(self, data: int, index: int, rows: int) -> None:
        os.ftruncate(index, rows * DIGEST_BYTES)
        os.ftruncate(data, rows * self._row_bytes)


def whole_rows(shard: Path, row_bytes: int) -> int:
    """Rows of a shard (named without ending) that are there with their digests."""
    try:
        data, index = (shard.with_suffix(ending).stat().st_size for ending in (ROWS, INDEX))
    except FileNotFoundError:
        return 0
    return min(data // row_bytes, index // DIGEST_BYTES)


def _lock(shard: Path) -> tuple[int, int] | None:
    """Rows and index, open for writing and ours; None when another process has them."""
    data = os.open(shard.with_suffix(ROWS), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(data, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return data, os.open(shard.with_suffix(INDEX), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except BlockingIOError:
        os.close(data)
        return None
    except BaseException:
        os.close(data)
        raise


def _write_at(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    """All of it: one call may take less."""
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _key(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little")
