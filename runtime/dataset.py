"""The data-set manifest: JSON Lines, read without torch.

One line is one image with captions, one question about it, or a conversation; image paths are relative to the
manifest:

    {"image": "images/1.png", "image_id": "1", "captions": ["a red circle"]}
    {"image": "images/1.png", "image_id": "1", "question": "what colour?", "answers": ["red"]}
    {"image": "images/1.png", "image_id": "1", "turns": [["what colour?", "red"], ["and the shape?", "a circle"]]}

`image_id` may be left out; the image's path as written is then its id. Unknown keys are kept in `extra`. Other formats
are read by `trainer.sources`, whose rows are the same.

    qforge data check data/train.jsonl
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import DataError, MissingFile

KNOWN_KEYS = ("image", "image_id", "captions", "question", "answers", "turns")


@dataclass(frozen=True)
class Row:
    """One line of a manifest."""

    image: Path
    """Absolute path."""
    image_id: str
    """Rows of one image share it."""
    captions: tuple[str, ...]
    """Reference captions; empty when the row is a question."""
    question: str | None
    """None when the row has only captions."""
    answers: tuple[str, ...]
    """Reference answers; empty for a question nobody answered yet."""
    extra: dict[str, Any]
    """Every other key of the line."""
    turns: tuple[tuple[str, str], ...] = ()
    """(question, answer) in the order of the conversation; empty when the row is none."""


def read_manifest(path: Path | str) -> list[Row]:
    """All rows, in order. Images are not opened; `check_manifest` does that.

    Raises:
        MissingFile: there is no such file.
        DataError: a line that is wrong (file:line, expected, found), or no line at all.
    """
    path = Path(path)
    rows = [parse_row(line, where, path.parent) for where, line in numbered_lines(path)]
    if not rows:
        raise DataError(f"{path}: expected at least one row, found an empty data set")
    return rows


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """("file:line", text) of every line that is not blank; a byte-order mark is dropped."""
    if path.is_dir():
        raise DataError(f"{path}: expected a manifest file (JSON Lines), found a folder; name the file in it")
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line
    except FileNotFoundError as error:
        raise MissingFile(f"{path}: expected a manifest (JSON Lines), found nothing under that name") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, found other bytes; save the manifest as UTF-8") from error


def parse_row(line: str, where: str, folder: Path) -> Row:
    """Read one line; `where` (file:line) opens the message of every DataError."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: expected one JSON object, found {line.strip()[:60]!r}") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected one JSON object, found {type(record).__name__}")
    return parse_record(record, where, folder)


def parse_record(record: dict[str, Any], where: str, folder: Path) -> Row:
    """A line as an object; `where` opens the message of every DataError, `folder` is what its path is relative to."""
    image = _text(record, "image", where)
    if image is None:
        raise DataError(f"{where}: expected the key 'image' with a path, found keys {sorted(record)}")
    question = _text(record, "question", where)
    row = Row(
        image=(folder / image).absolute(),
        image_id=_text(record, "image_id", where) or image,
        captions=_texts(record, "captions", where),
        question=question,
        answers=_texts(record, "answers", where),
        extra={key: value for key, value in record.items() if key not in KNOWN_KEYS},
        turns=_turns(record, where),
    )
    if row.answers and question is None:
        raise DataError(f"{where}: expected a 'question' beside 'answers', found none")
    if not row.captions and question is None and not row.turns:
        raise DataError(f"{where}: expected 'captions' or a 'question' (or 'turns'), found keys {sorted(record)}")
    return row


def as_record(row: Row) -> dict[str, Any]:
    """The line that `parse_record` makes this row of, whatever folder it lies in."""
    record: dict[str, Any] = {"image": str(row.image), "image_id": row.image_id}
    if row.captions:
        record["captions"] = list(row.captions)
    if row.question is not None:
        record |= {"question": row.question, "answers": list(row.answers)}
    if row.turns:
        record["turns"] = [list(turn) for turn in row.turns]
    return record | row.extra


def _turns(record: dict[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    turns = record.get("turns", [])
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise DataError(f"{where}: expected [question, answer] pairs under 'turns', found {json.dumps(turns)[:60]}")
    return tuple((_not_empty(asked, "turns", where), _not_empty(said, "turns", where)) for asked, said in turns)


def _text(record: dict[str, Any], key: str, where: str) -> str | None:
    value = record.get(key)
    if value is None:
        return None
    if key == "image_id" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # COCO numbers its images
    return _not_empty(value, key, where)


def _texts(record: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    values = record.get(key, [])
    if not isinstance(values, list):
        raise DataError(f"{where}: expected a list of texts under '{key}', found {json.dumps(values)[:60]}")
    return tuple(_not_empty(value, key, where) for value in values)


def _not_empty(value: object, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: expected text under '{key}', found {json.dumps(value)[:60]}")
    if not value.strip():
        raise DataError(f"{where}: expected text under '{key}', found empty text")
    return value
