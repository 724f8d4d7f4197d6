"""The cache's second tier: a folder that outlives a process and is shared by several.

What is read is checked byte for byte (`runtime.cache_entry`); what fails the check is removed, counted and computed
again. Nothing that goes wrong with the disk reaches a request: it is counted, kept as a sentence in `statistics`, and
writing pauses for a while.

Entries are kept apart by bundle and by what computed them, so that the figures of one provider are never another's.
"""

import os
import stat
import threading
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from runtime.backends import Device
from runtime.cache_entry import DamagedEntry, decode, encode
from runtime.cache_folder import CacheFolder
from runtime.errors import OutOfSpace
from runtime.query_cache import Statistics, cache_key

MAX_ENTRY_BYTES = 1024**3
"""Nothing larger is written, or read into memory because it bears an entry's name."""
RETRY_S = 30.0
"""Pause (seconds) between attempts to write after one failed: a full disk should not cost every request."""


class DiskCache:
    """Arrays by key in files; satisfies `runtime.query_cache.Cache`. Safe to share between threads and processes."""

    def __init__(self, folder: Path | str, digest: str, device: Device, max_bytes: int | None = None) -> None:
        """Of the bundle with `digest`, whose graphs run on `device`; the rest is as `CacheFolder` has it."""
        self.folder = CacheFolder(folder, max_bytes)
        self.hits = 0
        self.misses = 0
        self._digest = digest
        self._identity = {"bundle": digest, "engine": f"{device.backend}/{device.provider}"}
        self._counts = dict.fromkeys(("evictions", "writes", "discarded", "failures"), 0)
        self._problem: str | None = None
        self._pause_until_s = 0.0
        self._lock = threading.Lock()

    def get(self, key: str) -> npt.NDArray[np.float32] | None:
        """The array under `key` (read-only), or None; counts a hit or a miss."""
        name = self._name(key)
        array: npt.NDArray[np.float32] | None = None
        place = self.folder.place(self._digest, name)
        try:
            array = decode(_read(place), name)
            now_ns = time.time_ns()  # finer than the file system's own clock, which would make neighbours equal
            os.utime(place, ns=(now_ns, now_ns))
        except FileNotFoundError:
            pass
        except DamagedEntry:
            self._discard(place)
        except OSError as error:
            if array is None:  # else it is whole, in a folder that we may only read
                self._note_failure(error)
        with self._lock:
            self.hits += array is not None
            self.misses += array is None
        return array

    def __contains__(self, key: str) -> bool:
        """Whether there is a file for `key`; it was not checked."""
        return self.folder.place(self._digest, self._name(key)).is_file()

    def put(self, key: str, array: npt.NDArray[np.float32]) -> None:
        """Write a copy; when that fails it is counted, and nothing is written for `RETRY_S`."""
        if array.nbytes > MAX_ENTRY_BYTES or time.monotonic() < self._pause_until_s:
            return
        name = self._name(key)
        try:
            with self.folder.staged(name) as work:
                _write(work, encode(name, array))
                removed = self.folder.take_in(work, self.folder.place(self._digest, name))
                written = not work.exists()
        except OSError as error:
            self._pause_until_s = time.monotonic() + RETRY_S
            self._note_failure(error)
            return
        with self._lock:
            self._counts["writes"] += written
            self._counts["evictions"] += removed

    def statistics(self) -> Statistics:
        """What this object counted, and what the folder holds for all its users, under "disk".

        discarded: entries that were damaged, cut or foreign. failures: attempts that the disk refused, the latest of
        which is told by `problem`.
        """
        usage = self.folder.usage()
        with self._lock:
            return {
                "disk": {
                    "hits": self.hits,
                    "misses": self.misses,
                    **self._counts,
                    "problem": self._problem,
                    "bytes": usage.bytes,
                    "max_bytes": usage.max_bytes,
                }
            }

    def _name(self, key: str) -> str:
        return cache_key({**self._identity, "key": key})

    def _discard(self, place: Path) -> None:
        with self._lock:
            self._counts["discarded"] += 1
        try:
            self.folder.discard(place)
        except OSError as error:
            self._note_failure(error)

    def _note_failure(self, error: OSError) -> None:
        with self._lock:
            self._counts["failures"] += 1
            told = error.strerror or str(error)
            if isinstance(error, OutOfSpace):  # its own sentence advises to run the command again: no need
                told = f"no space left ({error.free_bytes:,} bytes are free)"
            self._problem = f"{self.folder.path}: {told}"


def _read(place: Path) -> bytes:
    """A plain file's content; what else bears its name (a link, a pipe, a folder) is no entry, and must not block."""
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if place.is_symlink():
            raise DamagedEntry("a link") from error
        raise
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > MAX_ENTRY_BYTES:
            raise DamagedEntry("not a plain file, or larger than any entry")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def _write(work: Path, content: bytes) -> None:
    descriptor = os.open(work, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    now_ns = time.time_ns()
    os.utime(work, ns=(now_ns, now_ns))
