"""Folders that are made once from files and kept in the user's cache: indexes of manifests, converted data sets.

A folder serves as long as its files keep their size, time and first MiB; then it is made again, in its place. Several
processes may ask at once: one makes it, the others wait.
"""

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.errors import InputError
from runtime.files import atomic_folder, write_json_atomic
from runtime.user_cache import user_cache

FORMAT = 1
"""Of what is written; one of another format is made again."""
HEAD_BYTES = 2**20
MANY_FILES = 16
"""More files than this are told by size and time alone."""
STAMP = "stamp.json"


@contextmanager
def cached_folder(
    kind: str, settings: Mapping[str, Any], files: Sequence[Path], write: Callable[[Path], None]
) -> Iterator[Path]:
    """The folder that `write` fills from `files` under `settings`; it is held until the block ends.

    Raises:
        InputError: the cache cannot be written.
    """
    name = hashlib.sha256(json.dumps([kind, settings], sort_keys=True).encode()).hexdigest()[:16]
    final = user_cache("data") / f"{kind}-{name}"
    stamp = {"format": FORMAT, "settings": dict(settings), "files": [_state_of(file, len(files)) for file in files]}
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        lock_file = (final.parent / f".{final.name}.making").open("w")
    except OSError as error:
        raise InputError(
            f"{final.parent}: the index of {files[0]} cannot be written there ({error.strerror}); "
            "set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    with lock_file as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _stamp_in(final) != stamp:
            with atomic_folder(final) as folder:
                write(folder)
                write_json_atomic(folder / STAMP, stamp)
        yield final


def _state_of(file: Path, among: int) -> dict[str, Any]:
    facts = file.stat()
    state: dict[str, Any] = {"file": str(file.absolute()), "bytes": facts.st_size, "time_ns": facts.st_mtime_ns}
    if among <= MANY_FILES:
        with file.open("rb") as content:
            state["head"] = hashlib.sha256(content.read(HEAD_BYTES)).hexdigest()
    return state


def _stamp_in(folder: Path) -> Any:
    try:
        return json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
