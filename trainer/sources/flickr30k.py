"""Flickr30k's results files: `results.csv` (image| number| text), `results_20130124.token` (image#number TAB text).

One row per image with all its captions. Neither has splits; Karpathy's JSON does.
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from runtime.dataset import numbered_lines
from runtime.errors import DataError
from trainer.sources.record import Entry
from trainer.sources.source import Source


def flickr30k_entries(source: Source) -> Iterator[Entry]:
    """Rows in the order of the file, which keeps the lines of an image together."""
    for image, lines in groupby(_captions(source.path), key=lambda line: line[1]):
        found = list(lines)
        yield found[0][0], {"image": image, "image_id": image, "captions": [caption for _, _, caption in found]}


def _captions(path: Path) -> Iterator[tuple[str, str, str]]:
    """(file:line, image, caption) of every line but the heading of the csv."""
    for number, (where, line) in enumerate(numbered_lines(path)):
        parts = [part.strip() for part in line.split("|")] if "|" in line else _token(line)
        if number == 0 and parts[:2] == ["image_name", "comment_number"]:
            continue
        if len(parts) != 3:
            raise DataError(
                f"{where}: expected 'image| number| comment' or 'image#number TAB comment', found {line.strip()[:60]!r}"
            )
        yield where, parts[0], parts[2]


def _token(line: str) -> list[str]:
    name, _, caption = line.strip().partition("\t")
    image, _, number = name.rpartition("#")
    return [image, number, caption] if image and caption else [line]
