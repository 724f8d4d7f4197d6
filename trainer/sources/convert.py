"""Any format → a manifest: read once, written to the user's cache, found there from then on.

So whatever reads manifests (training, calibration, evaluation) reads every format, and memory stays flat.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from runtime.dataset import Row, as_record, parse_record, read_manifest
from runtime.dataset_check import manifest_entries
from runtime.errors import DataError
from trainer.data_config import Format
from trainer.sources.arrow import files_of, huggingface_entries
from trainer.sources.cache import cached_folder
from trainer.sources.detect import format_of
from trainer.sources.flickr30k import flickr30k_entries
from trainer.sources.json_files import coco_entries, karpathy_entries, record_entries, vqav2_entries
from trainer.sources.record import Entry, as_manifest_record
from trainer.sources.rows import ManifestRows
from trainer.sources.source import ALL, Source
from trainer.sources.tars import shards_of, webdataset_entries

FIRST_PROBLEMS = 5
"""Kept of the entries that were left out."""
READERS: dict[Format, Callable[[Source], Iterator[Entry]]] = {
    "coco": coco_entries,
    "karpathy": karpathy_entries,
    "flickr30k": flickr30k_entries,
    "vqav2": vqav2_entries,
    "records": record_entries,
    "webdataset": webdataset_entries,
    "huggingface": huggingface_entries,
}
"""Every format but our own."""
USES: dict[str, tuple[Format, ...]] = {
    "split": ("karpathy", "huggingface"),
    "answers": ("vqav2",),
    "images": ("coco", "karpathy", "flickr30k", "vqav2", "records", "huggingface"),
}
"""Which formats a setting of a source is for."""
ROWS, LEFT_OUT = "rows.jsonl", "left_out.json"


def kind_of(source: Source) -> Format:
    """The format a source is read in.

    Raises:
        MissingFile, DataError: see `format_of`; DataError also for a setting that this format has no use for.
    """
    kind = source.format or format_of(source.path)
    told = {"split": source.split not in (None, ALL), "answers": source.answers, "images": source.images}
    idle = [name for name, given in told.items() if given and kind not in USES[name]]
    if idle:
        raise DataError(f"{source.path}: expected no {idle[0]!r}, as the {kind} format has no use for it; leave it out")
    return kind


def entries_of(source: Source) -> Iterator[tuple[str, Row | DataError]]:
    """Every entry of a data set as a row, or as what is wrong with it.

    Raises:
        MissingFile: there is nothing under that name.
        DataError: the file as a whole is not what its format asks for.
    """
    kind = kind_of(source)
    if kind == "manifest":
        yield from manifest_entries(source.path)
        return
    try:
        for where, record in READERS[kind](source):
            try:
                if isinstance(record, DataError):
                    raise record
                yield where, parse_record(as_manifest_record(record, where), where, source.image_folder)
            except DataError as error:
                yield where, error
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{source.path}: expected the {kind} format, found an entry that is not in it "
            f"({type(error).__name__}: {error})"
        ) from error


def as_manifest(sources: Sequence[Source]) -> Path:
    """The one manifest of all rows of `sources`; a single one that is a manifest is its own.

    Raises:
        MissingFile, DataError: see `entries_of`; DataError also when nothing is left.
    """
    kinds = {source: kind_of(source) for source in sources}
    if len(sources) == 1 and kinds[sources[0]] == "manifest":
        return sources[0].path
    described = [_described(source, kinds[source]) for source in sources]
    files = [file for source in sources for file in files_behind(source, kinds[source])]
    with cached_folder("rows", {"sources": described}, files, partial(_write, sources)) as folder:
        return folder / ROWS


def read_rows(path: Path) -> list[Row]:
    """All rows of a data set in any format (one split, or none), for what needs them at once.

    Raises:
        MissingFile, DataError: see `entries_of`.
    """
    return read_manifest(as_manifest([Source(path)]))


def rows_of(path: Path) -> ManifestRows:
    """As `read_rows`, for what looks at one row after the other: each is parsed when it is asked for."""
    return ManifestRows(as_manifest([Source(path)]))


def left_out(manifest: Path) -> tuple[int, list[str]]:
    """How many entries a conversion could not use, and what was wrong with the first; none for a user's manifest."""
    path = manifest.with_name(LEFT_OUT)
    if manifest.name != ROWS or not path.is_file():
        return 0, []
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["count"], found["first"]


def files_behind(source: Source, kind: Format | None = None) -> list[Path]:
    """The files that a data set's rows and texts are read from."""
    kind = kind or kind_of(source)
    if kind == "webdataset":
        return shards_of(source.path)
    if kind == "huggingface":
        return [file for _, file in files_of(source.path)]
    return [source.path, *([] if source.answers is None else [source.answers])]


def _described(source: Source, kind: Format) -> dict[str, Any]:
    """What of a source decides its rows; its weight does not."""
    paths = {"path": source.path, "images": source.images, "answers": source.answers}
    absolute = {key: None if path is None else str(path.absolute()) for key, path in paths.items()}
    return {**absolute, "format": kind, "split": source.split}


def _write(sources: Sequence[Source], folder: Path) -> None:
    count, problems = 0, list[str]()
    with (folder / ROWS).open("w", encoding="utf-8") as file:
        for source in sources:
            for _, row in entries_of(source):
                if isinstance(row, DataError):
                    count += 1
                    problems += [str(row)] if len(problems) < FIRST_PROBLEMS else []
                else:
                    file.write(json.dumps(as_record(row), ensure_ascii=False) + "\n")
        if not file.tell():
            name = " and ".join(str(source.path) for source in sources)
            first = f"; the first says: {problems[0]}" if problems else ""
            raise DataError(f"{name}: expected at least one usable row, found none{first}")
    (folder / LEFT_OUT).write_text(json.dumps({"count": count, "first": problems}, indent=2), encoding="utf-8")
