"""The data-set manifest: JSON Lines, read without torch.

One line is one image with captions, or one question about it; image paths are relative to the manifest:

    {"image": "images/1.png", "image_id": "1", "captions": ["a red circle"]}
    {"image": "images/1.png", "image_id": "1", "question": "what colour?", "answers": ["red"]}

`image_id` may be left out; the image's path as written is then its id. Unknown keys are kept in `extra`.

    qforge data check data/train.jsonl
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from runtime.errors import DataError, ImageError, MissingFile
from runtime.preprocess import load_image

KNOWN_KEYS = ("image", "image_id", "captions", "question", "answers")


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
    )
    if row.answers and question is None:
        raise DataError(f"{where}: expected a 'question' beside 'answers', found none")
    if not row.captions and question is None:
        raise DataError(f"{where}: expected 'captions' or a 'question', found keys {sorted(record)}")
    return row


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


@dataclass(frozen=True)
class Report:
    """What `check_manifest` counted and found wrong."""

    rows: int
    images: int
    """Different image files."""
    captions: int
    questions: int
    answers: int
    modes: dict[str, int]
    """PIL mode → image files; " + transparency" where a file has any."""
    problems: tuple[str, ...]
    """One sentence each; none when the set is fit for use."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """All counts and problems, ready for `json.dumps`."""
        return asdict(self) | {"ok": self.ok}


def check_manifest(path: Path | str, progress: Callable[[int, int], None] | None = None) -> Report:
    """Read every line and decode every image; `progress` is told (images done, images in all).

    Raises:
        MissingFile: there is no such file.
        DataError: it has no line at all.
    """
    path = Path(path)
    rows: dict[str, Row] = {}
    problems: list[str] = []
    lines = list(numbered_lines(path))
    if not lines:
        raise DataError(f"{path}: expected at least one row, found an empty data set")
    for where, line in lines:
        try:
            rows[where] = parse_row(line, where, path.parent)
        except DataError as error:
            problems.append(str(error))
    problems += _duplicates(rows)
    first_use = {row.image: where for where, row in reversed(rows.items())}
    modes: Counter[str] = Counter()
    for done, (image, where) in enumerate(sorted(first_use.items()), start=1):
        try:
            load_image(image)
            modes[_mode_of(image)] += 1
        except ImageError as error:
            problems.append(f"{where}: {error}")
        if progress is not None:
            progress(done, len(first_use))
    return Report(
        rows=len(lines),
        images=len(first_use),
        captions=sum(len(row.captions) for row in rows.values()),
        questions=sum(row.question is not None for row in rows.values()),
        answers=sum(len(row.answers) for row in rows.values()),
        modes=dict(sorted(modes.items())),
        problems=tuple(problems),
    )


def _duplicates(rows: Mapping[str, Row]) -> Iterator[str]:
    """A row said twice, or one id that stands for two files."""
    asked_at: dict[tuple[str, str | None], str] = {}
    image_at: dict[str, tuple[Path, str]] = {}
    for where, row in rows.items():
        first = asked_at.setdefault((row.image_id, row.question), where)
        if first != where:
            what = "captions" if row.question is None else f"question {row.question!r}"
            yield f"{where}: expected this only once, found {what} of image_id {row.image_id!r} already at {first}"
        image, first = image_at.setdefault(row.image_id, (row.image, where))
        if image != row.image:
            yield f"{where}: expected one image file per image_id, found {row.image_id!r} for another file at {first}"


def _mode_of(path: Path) -> str:
    with Image.open(path) as image:
        return image.mode + (" + transparency" if image.has_transparency_data else "")
