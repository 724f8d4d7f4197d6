"""Whether a data set is fit for use: every row read, every image decoded, duplicates found, in flat memory.

Of each row 24 bytes are kept (hashes of what must not repeat), so ten million rows fit; what repeats is named in a
second pass over the few rows concerned.
"""

import hashlib
import io
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from runtime.dataset import Row, numbered_lines, parse_row
from runtime.errors import DataError, ImageError
from runtime.packed import piece_of
from runtime.preprocess import load_image
from runtime.text import MAX_WORDS

Entries = Callable[[], Iterable[tuple[str, Row | DataError]]]
"""("file:line", row or what is wrong with it) of a data set, from the beginning each time it is called."""


@dataclass(frozen=True)
class Report:
    """What a check counted and found wrong."""

    rows: int
    images: int
    """Different image files."""
    captions: int
    questions: int
    answers: int
    turns: int
    """Questions and answers of conversations."""
    cut: int
    """Captions and questions of more than 50 words, which are read up to there."""
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
    return check_entries(lambda: manifest_entries(path), str(path), progress)


def manifest_entries(path: Path) -> Iterator[tuple[str, Row | DataError]]:
    """Each line of a manifest as a row, or as the error it gives."""
    for where, line in numbered_lines(path):
        try:
            yield where, parse_row(line, where, path.parent)
        except DataError as error:
            yield where, error


def check_entries(entries: Entries, name: str, progress: Callable[[int, int], None] | None = None) -> Report:
    """`check_manifest` for rows from anywhere; DataError when there is none: `name` is the data set's."""
    counts: Counter[str] = Counter()
    problems: list[str] = []
    asked, ids, images = array("Q"), array("Q"), array("Q")
    for _, row in entries():
        counts["rows"] += 1
        if isinstance(row, DataError):
            problems.append(str(row))
            continue
        asked.append(_hash(row.image_id, row.question, *row.turns))
        ids.append(_hash(row.image_id))
        images.append(_hash(str(row.image)))
        counts["captions"] += len(row.captions)
        counts["questions"] += row.question is not None
        counts["answers"] += len(row.answers)
        counts["turns"] += len(row.turns)
        counts["cut"] += sum(len(text.split()) > MAX_WORDS for text in (*row.captions, row.question or ""))
    if not counts["rows"]:
        raise DataError(f"{name}: expected at least one row, found an empty data set")
    asked_Q, ids_Q, images_Q = (np.frombuffer(column, np.uint64) for column in (asked, ids, images))
    problems += _duplicates(entries, _repeated(asked_Q), _ambiguous(ids_Q, images_Q))
    first_uses = np.sort(np.unique(images_Q, return_index=True)[1])
    modes, broken = _look_at(entries, first_uses, progress)
    named = {key: counts[key] for key in ("rows", "captions", "questions", "answers", "turns", "cut")}
    return Report(**named, images=len(first_uses), modes=modes, problems=(*problems, *broken))


def _rows(entries: Entries) -> Iterator[tuple[str, Row]]:
    return ((where, row) for where, row in entries() if not isinstance(row, DataError))


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode("utf-8", "replace"), digest_size=8).digest(), "little")


def _repeated(values: npt.NDArray[np.uint64]) -> set[int]:
    """Those that occur more than once."""
    found, times = np.unique(values, return_counts=True)
    return set(found[times > 1].tolist())


def _ambiguous(ids: npt.NDArray[np.uint64], images: npt.NDArray[np.uint64]) -> set[int]:
    """Ids that stand beside more than one image."""
    pairs = np.unique(np.stack([ids, images], axis=1), axis=0) if len(ids) else np.empty((0, 2), np.uint64)
    return _repeated(pairs[:, 0])


def _duplicates(entries: Entries, asked: set[int], ids: set[int]) -> Iterator[str]:
    """A row said twice, or one id that stands for two files."""
    if not asked and not ids:
        return
    asked_at: dict[tuple[object, ...], str] = {}
    image_at: dict[str, tuple[Path, str]] = {}
    for where, row in _rows(entries):
        key = (row.image_id, row.question, *row.turns)
        if _hash(*key) in asked:
            first = asked_at.setdefault(key, where)
            if first != where:
                what = f"question {row.question!r}" if row.question else "captions" if row.captions else "turns"
                yield f"{where}: expected this only once, found {what} of image_id {row.image_id!r} already at {first}"
        if _hash(row.image_id) in ids:
            image, first = image_at.setdefault(row.image_id, (row.image, where))
            if image != row.image:
                yield (
                    f"{where}: expected one image file per image_id, found {row.image_id!r} for another file at {first}"
                )


def _look_at(
    entries: Entries, chosen: npt.NDArray[np.intp], progress: Callable[[int, int], None] | None
) -> tuple[dict[str, int], list[str]]:
    """Decode the images of the rows at `chosen` (sorted); their modes, and a sentence for each that is broken."""
    modes: Counter[str] = Counter()
    problems = []
    wanted = iter(chosen.tolist())
    due, done = next(wanted, None), 0
    for number, (where, row) in enumerate(_rows(entries)):
        if number != due:
            continue
        try:
            load_image(row.image)
            modes[_mode_of(row.image)] += 1
        except ImageError as error:
            problems.append(f"{where}: {error}")
        due, done = next(wanted, None), done + 1
        if progress is not None:
            progress(done, len(chosen))
    return dict(sorted(modes.items())), problems


def _mode_of(path: Path) -> str:
    piece = piece_of(path)
    with Image.open(path if piece is None else io.BytesIO(piece.read())) as image:
        return image.mode + (" + transparency" if image.has_transparency_data else "")
