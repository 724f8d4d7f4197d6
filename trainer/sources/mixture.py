"""Several data sets as one sequence of rows, with the weight of each, and the part of one that is held out."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from runtime.dataset import Row
from runtime.errors import DataError
from trainer.sources.cache import cached_folder
from trainer.sources.convert import as_manifest, left_out
from trainer.sources.rows import SMALL_BYTES, ManifestRows, Places, Purpose, RowSequence
from trainer.sources.source import Source


@dataclass(frozen=True)
class Part:
    """One data set of a mixture."""

    rows: Sequence[Row]
    weight: float
    left_out: int = 0
    """Entries of the data set that could not be used, whatever its rows."""


class MixedRows(RowSequence):
    """The rows of all parts, one part after the other."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self._ends = np.cumsum([len(part.rows) for part in self.parts]).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def at(self, place: int) -> Row:
        """The row at `place` of all parts."""
        part = bisect_right(self._ends, place)
        return self.parts[part].rows[place - (self._ends[part - 1] if part else 0)]


class ChosenRows(RowSequence):
    """Some rows of another sequence."""

    def __init__(self, rows: Sequence[Row], places: Places) -> None:
        self._rows, self._places = rows, places

    def __len__(self) -> int:
        return len(self._places)

    def at(self, place: int) -> Row:
        """The row that is chosen at `place`."""
        return self._rows[int(self._places[place])]


def open_rows(sources: Sequence[Source], purpose: Purpose | None = None) -> MixedRows:
    """Every row of the sources, parsed when asked for.

    Raises:
        MissingFile: a source is not there.
        DataError: a source is not what its format asks for, or has no row.
    """
    return MixedRows([_part(source, purpose) for source in sources])


def _part(source: Source, purpose: Purpose | None) -> Part:
    manifest = as_manifest([source])
    return Part(ManifestRows(manifest, purpose), source.weight, left_out(manifest)[0])


def split_rows(
    sources: Sequence[Source], holdout: float, purpose: Purpose | None = None
) -> tuple[MixedRows, MixedRows]:
    """The rows to train on, and those of the `holdout` share of images that are watched.

    DataError when a source has too few images to have both.
    """
    kept, watched = [], []
    for source in sources:
        rows = ManifestRows(as_manifest([source]), purpose)
        places = _held_out(rows, holdout)
        sizes = [len(part) for part in places]
        if 0 in sizes:
            raise DataError(
                f"{source.path}: holding out {holdout:.0%} of its images leaves {sizes[0]} rows to train on "
                f"and {sizes[1]} to watch; both need some. Name a validation manifest or change data.holdout"
            )
        kept.append(Part(ChosenRows(rows, places[0]), source.weight, left_out(rows.path)[0]))
        watched.append(Part(ChosenRows(rows, places[1]), source.weight))
    return MixedRows(kept), MixedRows(watched)


def _held_out(rows: ManifestRows, holdout: float) -> tuple[Places, Places]:
    """Places to train on and to watch; found once for a long manifest."""
    if rows.path.stat().st_size <= SMALL_BYTES:
        return _divide(rows.image_ids(), holdout)
    settings = {"manifest": str(rows.path.absolute()), "holdout": holdout}
    with cached_folder("holdout", settings, [rows.path], partial(_write_division, rows, holdout)) as folder:
        return np.load(folder / "kept.npy", mmap_mode="r"), np.load(folder / "watched.npy", mmap_mode="r")


def _write_division(rows: ManifestRows, holdout: float, folder: Path) -> None:
    kept, watched = _divide(rows.image_ids(), holdout)
    np.save(folder / "kept.npy", kept)
    np.save(folder / "watched.npy", watched)


def _divide(image_ids: Iterable[str], holdout: float) -> tuple[Places, Places]:
    aside = np.fromiter((_share(image_id) < holdout for image_id in image_ids), np.bool_)
    return np.flatnonzero(~aside), np.flatnonzero(aside)


def _share(image_id: str) -> float:
    """A number in [0, 1) that depends on the image id alone, so all rows of an image fall on one side."""
    return int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "big") / 2**64
