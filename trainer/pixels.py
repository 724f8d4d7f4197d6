"""Rows with their pixels, read by background threads one step ahead (Pillow decodes without Python's lock).

A row that cannot be read, because of its image or its line, gives way to the next one that can: every batch is full,
on every rank, whatever is broken where.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from runtime.dataset import Row
from runtime.errors import DataError, ImageError, MissingFile
from runtime.preprocess import PreprocessSettings, load_image, preprocess, to_pixels
from trainer.augment import augmented
from trainer.config import AugmentConfig
from trainer.draws import StepDraws

WORKERS = min(8, os.cpu_count() or 1)
TRIES = 1_000
"""Rows that may be broken one after the other before training stops."""

Pixels = npt.NDArray[np.float32]
Place = tuple[int, tuple[int, ...], int]
"""Row, key of the step, place in the global batch: what a change of an image is a function of."""
Waiting = dict[Place, Future[tuple[Row, Pixels]]]


class PixelReader:
    """Pixels [3, H, W] of rows, changed at random as `augment` says; not at all without draws."""

    def __init__(self, rows: Sequence[Row], settings: PreprocessSettings, augment: AugmentConfig) -> None:
        self._rows, self._settings, self._augment = rows, settings, augment
        self._pool = ThreadPoolExecutor(WORKERS, "images")
        self._waiting: tuple[Waiting, Waiting] = ({}, {})
        """What was begun for this step, and for the next."""
        self.broken: dict[str, str] = {}
        """Images and lines of manifests that cannot be read, and why."""

    def ahead(self, indices: Iterable[int], draws: StepDraws) -> None:
        """Begin to read what the next step will ask for; what the step before this one left unasked is forgotten."""
        for future in self._waiting[0].values():
            future.cancel()
        places = [(index, draws.key, draws.place(b)) for b, index in enumerate(indices)]
        read = {place: self._pool.submit(self._read, place[0], draws, b) for b, place in enumerate(places)}
        self._waiting = (self._waiting[1], read)

    def batch(self, indices: Sequence[int], draws: StepDraws | None) -> list[tuple[Row, Pixels]]:
        """The rows at `indices`, broken ones replaced, with their pixels.

        Raises:
            DataError: a thousand rows one after the other cannot be read.
        """
        return [future.result() for future in [self._future(index, draws, b) for b, index in enumerate(indices)]]

    def row(self, index: int) -> Row | None:
        """The row at `index`; None for a line that is wrong, noted in `broken`."""
        try:
            return self._rows[index]
        except DataError as error:
            where, _, _ = str(error).partition(": ")
            self.broken[where] = str(error)
            return None

    def _future(self, index: int, draws: StepDraws | None, b: int) -> Future[tuple[Row, Pixels]]:
        if draws is not None:
            place = (index, draws.key, draws.place(b))
            for waiting in self._waiting:
                if place in waiting:
                    return waiting.pop(place)
        return self._pool.submit(self._read, index, draws, b)

    def _read(self, index: int, draws: StepDraws | None, b: int) -> tuple[Row, Pixels]:
        count = len(self._rows)
        for offset in range(min(count, TRIES)):
            row = self.row((index + offset) % count)
            pixels = None if row is None else self._pixels(row, draws, b)
            if row is not None and pixels is not None:
                return row, pixels
        raise DataError(
            f"none of {min(count, TRIES)} rows from row {index} on can be read; one says: "
            f"{next(iter(self.broken.values()))}"
        )

    def _pixels(self, row: Row, draws: StepDraws | None, b: int) -> Pixels | None:
        if str(row.image) in self.broken:
            return None
        try:
            if draws is None or not self._augment.active:
                return preprocess(row.image, self._settings)
            changed = augmented(load_image(row.image), self._settings, self._augment, draws.row(b, "image"))
            return to_pixels(changed, self._settings)
        except (ImageError, MissingFile) as error:
            self.broken[str(row.image)] = str(error)
            return None
