"""Files that appear whole or not at all.

A run can be killed at any moment. Whatever bears its final name is complete: it was written beside it under a hidden
name, flushed to the disk and renamed. What a killed run left behind is removed by the next writer of the same name;
a lock that dies with its process tells a dead writer's leftovers from a live one's work, also across containers.

    with atomic_folder(Path("bundle")) as folder:
        (folder / "manifest.json").write_text("{}")
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from runtime.errors import InputError, MissingFile, OutOfSpace
from runtime.packed import piece_of

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Disk full, quota used up, file larger than the file system or the process may write."""


def sha256_of(path: Path | str) -> str:
    """Hex SHA-256 of a file, read in pieces, or of an image packed in one (`runtime.packed`).

    Raises:
        MissingFile: there is no such file.
    """
    try:
        piece = piece_of(path)
        if piece is not None:
            return hashlib.sha256(piece.read()).hexdigest()
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise MissingFile(f"{path}: expected a file to hash, found none") from error


def sha256s_of(paths: Sequence[Path]) -> list[str]:
    """`sha256_of` of each, several at once: hashing is most of what it takes to open a bundle."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(sha256_of, paths))


@contextmanager
def atomic_folder(final: Path | str, *, replaces: str | None = None) -> Iterator[Path]:
    """Yield an empty folder that becomes `final` when the block ends well, and vanishes when it does not.

    An existing folder of that name is replaced; it stays untouched until the new one is complete. `replaces` names a
    file that only our own folders hold ("manifest.json"): without it, a folder that is not empty is refused, so that
    `--out ~/pictures` cannot cost anyone their pictures. None replaces any folder.

    Raises:
        InputError: `final` is there and is a file, or a folder that does not look like ours.
        OutOfSpace: the disk ran full inside the block.
    """
    final = Path(final).absolute()
    if final.exists() and not final.is_dir():
        raise InputError(f"{final}: expected a folder or nothing, found a file; choose another name")
    if replaces is not None and final.exists() and any(final.iterdir()) and not (final / replaces).exists():
        raise InputError(f"{final}: expected an empty folder or one with {replaces}, found other files; choose another")
    with _workspace(final) as work:
        work.mkdir()
        yield work
        for path in [*work.rglob("*"), work]:
            _flush_to_disk(path)
        _replace_folder(work, final)


@contextmanager
def scratch_folder(beside: Path | str) -> Iterator[Path]:
    """Yield an empty hidden folder on the disk of `beside`, gone when the block ends; OutOfSpace when that is full."""
    with _workspace(Path(beside).absolute()) as work:
        work.mkdir()
        yield work


@contextmanager
def scratch_file(beside: Path | str) -> Iterator[Path]:
    """Yield a hidden path on the disk of `beside`, for a file that is gone when the block ends unless it was renamed.

    For what can be made again and is checked when it is read: nothing is flushed to the disk. OutOfSpace when that is
    full.
    """
    with _workspace(Path(beside).absolute()) as work:
        yield work


def remove_leftovers(folder: Path) -> None:
    """Clear what killed writers left in `folder`, whatever the names they were to write."""
    for lock_path in folder.glob(".?*.????????.lock"):
        _remove_leftovers(folder / lock_path.name[1 : -len(".12345678.lock")])


def write_text_atomic(path: Path | str, text: str) -> None:
    """Write a UTF-8 text file whole or not at all; OutOfSpace when the disk is full."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: Path | str, content: bytes) -> None:
    """Write a file whole or not at all; OutOfSpace when the disk is full."""
    final = Path(path).absolute()
    if final.is_dir():
        raise InputError(f"{final}: expected a file or nothing, found a folder; choose another name")
    with _workspace(final) as work:
        work.write_bytes(content)
        _flush_to_disk(work)
        work.replace(final)
        _flush_to_disk(final.parent)


def write_json_atomic(path: Path | str, value: Any) -> None:
    """Write indented JSON (no NaN, which is not JSON) whole or not at all; OutOfSpace when the disk is full."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def _workspace(final: Path) -> Iterator[Path]:
    """A fresh hidden path beside `final`, held by a lock; gone afterwards unless it was renamed."""
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(final)
        stem = final.parent / f".{final.name}.{secrets.token_hex(4)}"
        lock_path, work = stem.with_name(stem.name + ".lock"), stem.with_name(stem.name + ".tmp")
        with lock_path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                yield work
            finally:
                _remove(work)
                lock_path.unlink(missing_ok=True)
    except Exception as error:
        if _ran_out_of_space(error):
            folder = next(path for path in final.parents if path.exists())
            raise OutOfSpace(folder, shutil.disk_usage(folder).free) from error
        raise


def _remove_leftovers(final: Path) -> None:
    """Clear what killed writers of `final` left; give back a folder that one of them had just set aside."""
    for lock_path in final.parent.glob(f".{glob.escape(final.name)}.????????.lock"):
        try:
            lock = lock_path.open("r+")
        except FileNotFoundError:  # its owner ended between the listing and here
            continue
        with lock:
            if not _take(lock):
                continue  # its owner is alive
            old = lock_path.with_suffix(".old")
            if old.exists() and not final.exists():
                old.rename(final)
            _remove(old)
            _remove(lock_path.with_suffix(".tmp"))
            lock_path.unlink(missing_ok=True)


def _take(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _replace_folder(work: Path, final: Path) -> None:
    """Rename `work` to `final`, setting an older `final` aside first; it comes back if the rename fails."""
    old = work.with_suffix(".old")
    if final.exists():
        final.rename(old)
    try:
        work.rename(final)
    except BaseException:
        if old.exists():
            old.rename(final)
        raise
    _flush_to_disk(final.parent)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _ran_out_of_space(error: BaseException | None) -> bool:
    """True for a full disk anywhere in the chain; compiled libraries keep only the system's words, not its number."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return True
        if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
            return True
        error = error.__cause__ or error.__context__
    return False
