"""A folder of entries that several processes fill, and that stays below its bound.

    FOLDER/query-cache.json               the ledger: bytes held and the bound; files come and go under its lock
    FOLDER/<bundle, 16 hex>/ab/<ab…, 64>  one entry each; its time of change says when it was last used
    FOLDER/staging/                       what is being written; it becomes an entry by a rename

The bound belongs to the folder, so that no two processes can disagree about it. Writing a file needs no lock; only the
rename and the count of its bytes do. The ledger is raised before the rename: a writer that is killed between the two
leaves a count that is too high, never one too low, and the next look at all files sets it right. Readers take no lock.
"""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import InputError, MissingFile
from runtime.files import NO_SPACE, remove_leftovers, scratch_file

LEDGER = "query-cache.json"
STAGING = "staging"
DEFAULT_MAX_BYTES = 4 * 1024**3
"""Bound of a folder that was given none."""
EVICT_TO = 0.98
"""Share of the bound that is left when files are removed: finding the oldest means looking at all, so not each time."""
GROUP_CHARS = 16
SHARD_CHARS = 2
"""Letters that name the folder of an entry within its group: removing from one folder of 10,000 files took 10 times as
long as from 256 (ext4)."""
_GROUP, _ENTRY = re.compile(rf"[0-9a-f]{{{GROUP_CHARS}}}"), re.compile(r"[0-9a-f]{64}")
_LEDGER_CHARS = 128  # always as long, so that writing it again needs no room on a full disk


@dataclass(frozen=True)
class Stored:
    """One entry on the disk."""

    path: Path
    bytes: int
    used_ns: int
    """When it was last used (nanoseconds since 1970)."""

    @property
    def group(self) -> str:
        """The first letters of the digest of its bundle."""
        return self.path.parents[1].name


@dataclass
class Ledger:
    """What the folder's own record says; only whoever holds its lock may change it."""

    bytes: int
    max_bytes: int


class CacheFolder:
    """The files of a disk cache; every method is safe beside other threads and processes."""

    def __init__(self, path: Path | str, max_bytes: int | None = None) -> None:
        """Open `path`, or make it, readable by this user alone; `max_bytes` sets the folder's bound anew.

        Raises:
            InputError: a file, a folder with other content, one of another user, or a bound below 1.
        """
        self.path = Path(path).resolve()
        self.staging = self.path / STAGING
        if max_bytes is not None and max_bytes < 1:
            raise InputError(f"{self.path}: expected a bound of at least 1 byte for the cache, found {max_bytes}")
        _make_private(self.path)
        self._new_max_bytes = max_bytes or DEFAULT_MAX_BYTES
        if max_bytes is not None or not (self.path / LEDGER).exists():
            try:
                with self._locked() as ledger:
                    ledger.max_bytes = max_bytes or ledger.max_bytes
                    self._make_room(ledger, 0)
                    self._save(ledger)
            except OSError as error:
                if error.errno not in NO_SPACE:  # a full disk stops no one from answering
                    raise _unusable(self.path, error) from error
        with contextlib.suppress(OSError):  # a cache that may only be read
            remove_leftovers(self.staging)

    def place(self, group: str, name: str) -> Path:
        """Where the entry `name` (64 hex letters) of `group` lies."""
        return self.path / group[:GROUP_CHARS] / name[:SHARD_CHARS] / name

    def usage(self) -> Ledger:
        """Bytes held and the bound, as of now."""
        try:
            return _parsed((self.path / LEDGER).read_bytes())
        except (OSError, ValueError):
            return self._counted()

    def entries(self) -> Iterator[Stored]:
        """Every entry, in no order; what does not bear an entry's name is no concern of ours."""
        for group in _listed(self.path):
            shards = _listed(group) if _GROUP.fullmatch(group.name) else []
            for shard in shards:
                for file in _listed(shard):
                    if _ENTRY.fullmatch(file.name) and not file.is_dir(follow_symlinks=False):
                        with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                            facts = file.stat(follow_symlinks=False)
                            yield Stored(Path(file.path), facts.st_size, facts.st_mtime_ns)

    @contextmanager
    def staged(self, name: str) -> Iterator[Path]:
        """Yield a path to write a file at, for `take_in`; gone when the block ends otherwise, or with its process."""
        for folder in (self.path, self.staging):  # someone may have removed it all
            folder.mkdir(mode=0o700, exist_ok=True)
        with scratch_file(self.staging / name) as work:
            yield work

    def take_in(self, work: Path, place: Path) -> int:
        """Rename a finished file to its place; returns how many others were removed for it.

        A file larger than the whole bound stays where it is. OSError when the folder takes nothing.
        """
        size = work.stat().st_size
        with self._locked() as ledger:
            if size > ledger.max_bytes:
                return 0
            removed = self._make_room(ledger, size)
            for folder in (place.parents[1], place.parent):
                folder.mkdir(mode=0o700, exist_ok=True)
            ledger.bytes += size - _size(place)
            self._save(ledger)
            work.replace(place)
        return removed

    def discard(self, place: Path) -> None:
        """Remove one entry."""
        with self._locked() as ledger:
            ledger.bytes = max(0, ledger.bytes - self._remove([Stored(place, _size(place), 0)]))
            self._save(ledger)

    def clear(self, group: str | None = None) -> list[Stored]:
        """Remove and return all entries, or those of one group."""
        with self._locked() as ledger:
            found = list(self.entries())
            gone = [entry for entry in found if group is None or entry.group == group[:GROUP_CHARS]]
            ledger.bytes = sum(entry.bytes for entry in found) - self._remove(gone)
            self._save(ledger)
            for level in (0, 1):
                for folder in {entry.path.parents[level] for entry in gone}:
                    with contextlib.suppress(OSError):  # it holds something else
                        folder.rmdir()
        remove_leftovers(self.staging)
        return gone

    def _make_room(self, ledger: Ledger, wanted: int) -> int:
        """Remove the least recently used until `wanted` bytes fit; how many were removed."""
        if ledger.bytes + wanted <= ledger.max_bytes:
            return 0
        remove_leftovers(self.staging)
        found = sorted(self.entries(), key=lambda entry: entry.used_ns)
        ledger.bytes, removed = sum(entry.bytes for entry in found), 0
        if ledger.bytes + wanted <= ledger.max_bytes:
            return 0  # the count was too high
        for entry in found:
            if ledger.bytes + wanted <= ledger.max_bytes * EVICT_TO:
                break
            ledger.bytes -= self._remove([entry])
            removed += 1
        return removed

    @staticmethod
    def _remove(entries: Iterable[Stored]) -> int:
        """Bytes freed."""
        freed = 0
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                entry.path.unlink()
                freed += entry.bytes
        return freed

    @contextmanager
    def _locked(self) -> Iterator[Ledger]:
        """The ledger, with its lock held."""
        self.path.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(self.path / LEDGER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                ledger = _parsed(os.pread(descriptor, _LEDGER_CHARS, 0))
            except ValueError:  # new, or damaged: count anew
                ledger = self._counted()
            yield ledger
        finally:
            os.close(descriptor)

    def _counted(self) -> Ledger:
        return Ledger(sum(entry.bytes for entry in self.entries()), self._new_max_bytes)

    def _save(self, ledger: Ledger) -> None:
        """Call this with the lock held."""
        text = json.dumps({"bytes": ledger.bytes, "max_bytes": ledger.max_bytes}).ljust(_LEDGER_CHARS - 1)
        descriptor = os.open(self.path / LEDGER, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(descriptor, f"{text}\n".encode(), 0)
        finally:
            os.close(descriptor)


def existing_cache(path: Path) -> CacheFolder:
    """The cache at `path`.

    Raises:
        MissingFile: there is none.
    """
    if not (path / LEDGER).is_file():
        raise MissingFile(
            f"{path}: expected a query cache (a folder with {LEDGER}), found none; "
            f"make one: qforge cache warm BUNDLE IMAGES --cache-dir {path}"
        )
    return CacheFolder(path)


def _make_private(path: Path) -> None:
    """A folder for us alone; refuses one that holds what is not ours."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: expected a folder for the cache or nothing, found a file; choose another name")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = os.listdir(path)  # noqa: PTH208 - one look, so that a cache being made beside us is seen as one
        if names and LEDGER not in names:
            raise InputError(
                f"{path}: expected an empty folder or a query cache (with {LEDGER}), found other files; "
                f"choose another folder"
            )
        if path.stat().st_mode & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path}: expected a folder that this user may make and own for the cache, found: "
        f"{error.strerror or error}; choose another folder"
    )


def _parsed(content: bytes) -> Ledger:
    try:
        record = json.loads(content)
        held, bound = int(record["bytes"]), int(record["max_bytes"])
    except (TypeError, KeyError) as error:
        raise ValueError("not a ledger") from error
    if held < 0 or bound < 1:
        raise ValueError("not a ledger")
    return Ledger(held, bound)


def _listed(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    """What is in a folder; nothing where it is none, or a link to one."""
    if not folder.is_dir() or folder.is_symlink():
        return []
    try:
        with os.scandir(folder) as found:
            return list(found)
    except FileNotFoundError:
        return []


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0
