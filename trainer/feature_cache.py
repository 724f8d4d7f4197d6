"""Frozen image features on the disk: made once, read by every epoch, stage, run and process that asks for the same.

    FOLDER/feature-cache.json         that it is one; bytes held, under a lock
    FOLDER/<tower, 16 hex>/tower.json what made the features: weights' hash, layer, pixels, shape of a row
    FOLDER/<tower, 16 hex>/...        rows (trainer/feature_shards.py)
    FOLDER/<tower, 16 hex>/lock       held by the one process that makes rows known, after it has written them

A row is found by what made it and by what it was made of. The tower counts by the content of its weights, its
configuration, the layer that is read, and how an image becomes pixels (size, interpolation, mean, standard deviation).
The image counts by the SHA-256 of its encoded bytes, not by path, size and time: a file that changes within a second
and keeps its size never hits, a data set that is copied or moved always does, members of tars have no path of their
own, and reading a JPEG to hash it (0.1 MB) costs a fraction of reading its features (ViT-g: 0.7 MB).

Values are kept in half precision: 0.69 MiB an image for ViT-g at 224 pixels. The loss it changes is in LOG.md. What is
full stays as it is: in a shuffled epoch every image is as likely to be next as any other, so throwing some out for
others gains nothing.
"""

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.errors import DataError, InputError
from runtime.files import NO_SPACE, write_json_atomic
from trainer.feature_shards import DIGEST_BYTES, HEADER_BYTES, ShardReader, ShardWriter

FORMAT = 1
LEDGER, TOWER, LOCK = "feature-cache.json", "tower.json", "lock"
_LEDGER_CHARS = 128  # always as long, so that writing it again needs no room on a full disk
FOLDER_CHARS = 16

Halves = npt.NDArray[np.float16]


@dataclass
class Statistics:
    """What one process got out of a cache, and put into it."""

    hits: int = 0
    """Images whose features were there."""
    misses: int = 0
    """Images that had to pass the tower."""
    stored: int = 0
    """Images whose features were written; fewer than misses when the cache is full, or another process was first."""
    bytes: int = 0
    """Held in the folder, by all towers, when last looked at."""

    def as_json(self) -> dict[str, int]:
        """Ready for `json.dumps`."""
        return asdict(self)


# Shape letters: B images, N image tokens, E image width
class FeatureCache:
    """The features of one tower in a folder; safe beside other threads and processes."""

    def __init__(self, folder: Path, tower: dict[str, Any], limit_bytes: int) -> None:
        """Open the folder, or make it; `tower` is everything that made the features (trainer/feature_key.py).

        `limit_bytes` bounds the folder, with what it holds of other towers.

        Raises:
            InputError: a file, or a folder with other content.
            DataError: a cache of another format.
        """
        self.folder, self.limit_bytes = folder, limit_bytes
        self.statistics = Statistics()
        self.full: str | None = None
        """Why nothing is stored any more; None as long as there is room."""
        self._tower, self._lock = tower, threading.Lock()
        digest = hashlib.sha256(json.dumps(tower, sort_keys=True).encode()).hexdigest()
        self._place = folder / digest[:FOLDER_CHARS]
        _require_ours(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with self._ledger() as held:  # before anything else is in the folder, so that others beside us know it as ours
            self.statistics.bytes = held.bytes
        self._place.mkdir(exist_ok=True)
        self.shape = self._known_shape()
        """[N, E] of one image; None until the first one is written."""
        self._reader: ShardReader | None = None
        self._writer: ShardWriter | None = None

    def read(self, digests: Sequence[bytes]) -> dict[int, Halves]:
        """Place in `digests` → features [N, E], of those that are there."""
        with self._lock:
            reader = self._reading()
            if reader is None or self.shape is None:
                return {}
            rows = np.empty((len(digests), int(np.prod(self.shape))), np.float16)
            found = reader.read(digests, rows)
            if not found.all() and reader.refresh():  # another process may have made them meanwhile
                found = reader.read(digests, rows)
            self.statistics.hits += int(found.sum())
            return {int(b): rows[b].reshape(self.shape) for b in np.flatnonzero(found)}

    def has(self, digests: Sequence[bytes]) -> set[bytes]:
        """Those that are there, by the first half of their digest, without reading their features."""
        with self._lock:
            reader = self._reading()
            if reader is None:
                return set()
            reader.refresh()
            found = {digest for digest, there in zip(digests, reader.has(digests), strict=True) if there}
            self.statistics.hits += len(found)
            return found

    def write(self, digests: Sequence[bytes], features_BNE: Halves) -> None:
        """Keep features that were not there; those beyond the bound, or a full disk, are not kept and `full` says so.

        What another process wrote meanwhile stays as that one wrote it: the processes of one step may meet an image
        with several captions together.

        Raises:
            DataError: their shape is not that of the tower's others.
        """
        with self._lock:
            self.statistics.misses += len(digests)
            self._settle(features_BNE.shape[1:])
            rows = features_BNE.reshape(len(digests), -1)
            row_bytes = HEADER_BYTES + rows[0].nbytes
            room = 0 if self.full else self._reserve(len(digests), DIGEST_BYTES + row_bytes)
            if not room:
                return
            if self._writer is None:
                self._writer = ShardWriter(self._place, row_bytes)
            try:
                kept = self._writer.append(digests[:room], rows[:room], self._absent)
            except OSError as error:
                if error.errno not in NO_SPACE:
                    raise
                self.full = f"the disk of {self.folder} takes no more"
                return
            self.statistics.stored += kept
            if kept < room:
                self._give_back((room - kept) * (DIGEST_BYTES + row_bytes))

    def close(self) -> None:
        """Let go of the files."""
        with self._lock:
            for user in (self._reader, self._writer):
                if user is not None:
                    user.close()
            self._reader = self._writer = None

    @contextmanager
    def _absent(self, digests: Sequence[bytes]) -> Iterator[list[int]]:
        """Places in `digests` of those that are not there, or damaged; no other process makes rows known meanwhile."""
        reader = self._reading()
        assert reader is not None and self.shape is not None, "_settle() comes first"
        with _locked(self._place / LOCK):
            reader.refresh()
            known = np.flatnonzero(reader.has(digests)).tolist()
            rows = np.empty((len(known), int(np.prod(self.shape))), np.float16)
            whole = reader.read([digests[place] for place in known], rows)
            there = {place for place, found in zip(known, whole.tolist(), strict=True) if found}
            yield [place for place in range(len(digests)) if place not in there]

    def _reading(self) -> ShardReader | None:
        """The reader; None as long as nobody wrote anything."""
        self.shape = self.shape or self._known_shape()
        if self._reader is None and self.shape is not None:
            self._reader = ShardReader(self._place, HEADER_BYTES + 2 * int(np.prod(self.shape)))
        return self._reader

    def _settle(self, shape: tuple[int, ...]) -> None:
        """The first features say the shape of all."""
        self.shape = self.shape or self._known_shape()
        if self.shape is None:
            write_json_atomic(self._place / TOWER, {"tower": self._tower, "shape": list(shape)})
            self.shape = shape
        if self.shape != shape:
            raise DataError(
                f"{self._place / TOWER}: expected features {list(shape)} of one image, as this tower gives, found "
                f"{list(self.shape)}; delete {self._place}"
            )

    def _known_shape(self) -> tuple[int, ...] | None:
        file = self._place / TOWER
        try:
            return tuple(int(size) for size in json.loads(file.read_text(encoding="utf-8"))["shape"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{file}: expected the shape of features, found other data; delete {self._place}"
            ) from error

    def _reserve(self, wanted: int, row_bytes: int) -> int:
        """Of `wanted` rows, how many still fit below the bound; their bytes are counted from now on."""
        with self._ledger() as held:
            if held.bytes + wanted * row_bytes > self.limit_bytes:
                held.bytes = _counted(self.folder)  # a killed writer's reservation may have come to nothing
            room = min(wanted, max(0, self.limit_bytes - held.bytes) // row_bytes)
            held.bytes += room * row_bytes
            self.statistics.bytes = held.bytes
        if room < wanted:
            self.full = f"{self.folder} holds its data.features.limit_gb of {self.limit_bytes / 1e9:g}"
        return room

    def _give_back(self, size: int) -> None:
        """Bytes that were reserved and not taken."""
        with self._ledger() as held:
            held.bytes = max(0, held.bytes - size)
            self.statistics.bytes = held.bytes

    @contextmanager
    def _ledger(self) -> Iterator["_Held"]:
        """The folder's own record of its bytes, with its lock held."""
        with _locked(self.folder / LEDGER) as descriptor:
            held = _parsed(os.pread(descriptor, _LEDGER_CHARS, 0), self.folder)
            yield held
            text = json.dumps({"format": FORMAT, "bytes": held.bytes}).ljust(_LEDGER_CHARS - 1)
            os.pwrite(descriptor, f"{text}\n".encode(), 0)


@contextmanager
def _locked(file: Path) -> Iterator[int]:
    """Its descriptor, while no other process holds the file; the lock dies with its holder."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


@dataclass
class _Held:
    bytes: int


def _parsed(content: bytes, folder: Path) -> _Held:
    """What the ledger says; a new or damaged one is counted anew."""
    try:
        record = json.loads(content)
        found, held = record["format"], int(record["bytes"])
    except (ValueError, KeyError, TypeError):
        return _Held(_counted(folder))
    if found != FORMAT:
        raise DataError(f"{folder / LEDGER}: expected format {FORMAT}, found {found!r}; delete {folder}, or upgrade")
    return _Held(held)


def _counted(folder: Path) -> int:
    """Bytes of all shards, as they are."""
    return sum(file.stat().st_size for ending in ("rows", "index") for file in folder.glob(f"*/*.{ending}"))


def _require_ours(folder: Path) -> None:
    """InputError unless `folder` is a feature cache, empty, or not there."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: expected a folder for image features or nothing, found a file; choose another")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / LEDGER).exists():
        raise InputError(
            f"{folder}: expected an empty folder or a feature cache (with {LEDGER}), found other files; choose another "
            f"data.features.folder"
        )
