"""Webdataset shards: tars in which files of one name are one sample (`0001.jpg` with `0001.txt` or `0001.json`).

The shards are listed once; from then on each image is a range of bytes in its shard (`runtime.packed`), so rows are
read in any order and a run resumes by its step alone (webdataset itself streams, and cannot).
"""

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.errors import DataError, MissingFile
from runtime.packed import packed_path
from trainer.sources.record import CAPTIONS, Entry
from trainer.sources.source import Source

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
"""Extensions of a sample's image; with several, the first of these."""
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def shards_of(path: Path) -> list[Path]:
    """The tars that a path names: a file, a folder of them, a pattern with `*`, or `{000..331}`.

    Raises:
        MissingFile: one of them is not there, or none is found.
    """
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
    elif "*" in path.name:
        found = sorted(path.parent.glob(path.name))
    else:
        found = _expanded(path)
    absent = [shard for shard in found if not shard.is_file()]
    if absent or not found:
        name = absent[0] if absent else path
        raise MissingFile(f"{name}: expected a tar shard, found nothing under that name")
    return found


def _expanded(path: Path) -> list[Path]:
    braces = _RANGE.search(str(path))
    if braces is None:
        return [path]
    first, last = braces[1], braces[2]
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [expanded for number in numbers for expanded in _expanded(Path(str(path).replace(braces[0], number, 1)))]


def webdataset_entries(source: Source) -> Iterator[Entry]:
    """One row per sample that has an image, shard after shard."""
    for shard in shards_of(source.path):
        name, files = "", dict[str, tarfile.TarInfo]()
        with shard.open("rb") as content:
            for member in _members(shard):
                stem, extension = _sample_of(member.name)
                if stem != name and files:
                    yield from _entry(shard, name, files, content)
                    files = {}
                name = stem
                files[extension] = member
            if files:
                yield from _entry(shard, name, files, content)


def _sample_of(name: str) -> tuple[str, str]:
    """(sample, extension): a sample's name ends at the first dot of its last part, as in webdataset."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()


def _members(shard: Path) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(shard, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # or it remembers every one it has seen
                if member.isfile():
                    yield member
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{shard}: expected an uncompressed tar, found {error}; a compressed one is to be unpacked first, as its "
            "images cannot be read in any order"
        ) from error


def _entry(shard: Path, name: str, files: dict[str, tarfile.TarInfo], content: Any) -> Iterator[Entry]:
    """The sample as a record; none for one without an image (a shard may hold an index of itself)."""
    image = next((files[extension] for extension in IMAGES if extension in files), None)
    if image is None:
        return
    where = f"{shard}/{name}"
    record: Any = {}
    if "json" in files:
        try:
            record = json.loads(_bytes_of(files["json"], content))
        except ValueError:
            record = None
    if not isinstance(record, dict):
        yield where, DataError(f"{where}.json: expected one JSON object, found something else; write the shard again")
        return
    if "txt" in files and not any(record.get(key) for key in CAPTIONS):
        record["captions"] = [_bytes_of(files["txt"], content).decode("utf-8", "replace").strip()]
    record["image"] = str(packed_path(shard.absolute(), image.offset_data, image.size, Path(image.name).name))
    record["image_id"] = record.get("image_id") or f"{shard.name}/{name}"
    yield where, record


def _bytes_of(member: tarfile.TarInfo, content: Any) -> bytes:
    content.seek(member.offset_data)
    found: bytes = content.read(member.size)
    return found
