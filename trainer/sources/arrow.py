"""Hugging Face datasets: a folder of `save_to_disk`, a folder of Parquet or Arrow files, or one such file.

Arrow files hold an image's bytes in one piece, so a row names them by their place in the file (`runtime.packed`) and
nothing of Arrow is needed to read it later. Parquet is compressed; its rows go once into an Arrow file in the cache,
as the datasets library does.
"""

import json
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from runtime.errors import DataError, require
from runtime.packed import packed_path
from trainer.sources.cache import cached_folder
from trainer.sources.record import ANSWERS, CAPTIONS, Entry
from trainer.sources.source import Source, chosen_splits

KEPT = {*CAPTIONS, *ANSWERS, "question", "turns", "conversations", "image_id", "cocoid", "question_id"}
"""Columns that become part of a row; others stay in the file."""
ARROW = "rows.arrow"
BATCH_ROWS = 256
"""Rows of a record batch that Parquet is rewritten in."""


def files_of(path: Path) -> list[tuple[str, Path]]:
    """(split, file) of every Arrow or Parquet file that belongs to a data set, in order."""
    if path.is_file():
        return [(path.stem.partition("-")[0], path)]
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return [(split, file) for split in splits for _, file in files_of(path / split)]
    if (path / "state.json").is_file():
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return [(state.get("_split") or "train", path / listed["filename"]) for listed in state["_data_files"]]
    found = sorted(file for suffix in ("parquet", "arrow") for file in path.rglob(f"*.{suffix}"))
    return [(file.stem.partition("-")[0], file) for file in found]


def huggingface_entries(source: Source) -> Iterator[Entry]:
    """One row per row of the wanted splits."""
    require("pyarrow", extra="data", why=f"Reading {source.path}")
    files = files_of(source.path)
    wanted = chosen_splits(source, (split for split, _ in files))
    for split, listed in groupby((pair for pair in files if pair[0] in wanted), key=lambda pair: pair[0]):
        number = 0
        for _, file in listed:
            arrow = file if file.suffix == ".arrow" else _as_arrow(file)
            for record in _records(arrow, source):
                yield f"{source.path}: {split}[{number}]", {**record, "split": split}
                number += 1


def _as_arrow(file: Path) -> Path:
    """A Parquet file rewritten as an uncompressed Arrow stream, in the cache."""
    with cached_folder("arrow", {"file": str(file.absolute())}, [file], partial(_write_arrow, file)) as folder:
        return folder / ARROW


def _write_arrow(file: Path, folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
        with (
            pa.OSFile(str(folder / ARROW), "wb") as sink,
            pa.ipc.new_stream(sink, parquet.schema_arrow) as writer,
        ):
            for batch in parquet.iter_batches(BATCH_ROWS):
                writer.write_batch(batch)
    except pa.ArrowInvalid as error:
        raise DataError(f"{file}: expected a Parquet file, found {error}") from error


def _records(file: Path, source: Source) -> Iterator[dict[str, Any]]:
    """Rows of an Arrow file (stream or file format), images by their place in it."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as content:
        start = content.read_buffer(1).address  # of byte 0, from which a column's address tells its place
        content.seek(0)
        try:
            batches: Any = pa.ipc.open_stream(content)
        except pa.ArrowInvalid:
            try:
                opened = pa.ipc.open_file(content)
            except pa.ArrowInvalid as error:
                raise DataError(f"{file}: expected an Arrow file, found {error}") from error
            batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
        for batch in batches:
            images = _images(batch, file, start, content.size(), source)
            texts = batch.select([name for name in batch.schema.names if name in KEPT]).to_pylist()
            for image, record in zip(images, texts, strict=True):
                yield {key: value for key, value in record.items() if value is not None} | {"image": image}


def _images(batch: Any, file: Path, start: int, size: int, source: Source) -> list[str | None]:
    """Where the image of each row lies: in this file, or in one of its own."""
    import pyarrow as pa

    names = [field.name for field in batch.schema if _holds_images(field)]
    if not names:
        raise DataError(
            f"{file}: expected a column 'image' of bytes, or of bytes and path, found {', '.join(batch.schema.names)}"
        )
    column = batch.column(names[0])
    if pa.types.is_string(column.type):
        return [None if path is None else str(source.image_folder / path) for path in column.to_pylist()]
    struct = pa.types.is_struct(column.type)
    content = column.field("bytes") if struct else column
    paths = column.field("path").to_pylist() if struct else [None] * len(column)
    wide = pa.types.is_large_binary(content.type)
    _, offsets, data = content.buffers()
    first = content.offset
    ends = memoryview(offsets).cast("q" if wide else "i")[first : first + len(content) + 1]
    found: list[str | None] = []
    for row, (path, valid) in enumerate(zip(paths, content.is_valid().to_pylist(), strict=True)):
        if valid:
            place = data.address - start + ends[row]
            if not 0 <= place <= size:
                raise DataError(f"{file}: expected uncompressed record batches, found compressed ones; save it again")
            name = Path(path).name if path else f"{row}"
            found.append(str(packed_path(file.absolute(), place, ends[row + 1] - ends[row], name)))
        else:
            found.append(None if path is None else str(source.image_folder / path))
    return found


def _holds_images(field: Any) -> bool:
    import pyarrow as pa

    kind = field.type
    if pa.types.is_struct(kind):
        return {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return field.name == "image" and (binary or pa.types.is_string(kind))
