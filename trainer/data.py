"""Rows and their image features for training: the data sets of a run, and what a step sees of them.

Which rows those are is a function of seed and step alone (`trainer.order`), so nothing about the order is remembered
and a resumed run sees what an uninterrupted one would have seen.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from runtime.dataset import Row
from runtime.errors import DataError, ImageError, InputError, MissingFile
from runtime.preprocess import preprocess
from runtime.progress import Progress
from runtime.text import MAX_WORDS
from trainer.data_config import AugmentConfig, DataConfig, SourceConfig
from trainer.draws import StepDraws
from trainer.order import mixed_rows_at
from trainer.pixels import TRIES, WORKERS, PixelReader
from trainer.sources.mixture import MixedRows, open_rows, split_rows
from trainer.sources.rows import Purpose
from trainer.sources.source import Source, resolve_source
from trainer.towers import VisionTower

ENCODE_BATCH = 64
"""Images that pass the frozen tower together when features are made ahead."""
FEATURE_BYTES = 2 * 2**30
"""Most memory that features made ahead may take; images beyond pass the tower again each time they are seen."""
AHEAD_ROWS = 65_536
"""Most rows that are looked through before the first step, and whose features are made ahead; of a larger set, a row
and its image are read when a step asks for them."""
UNCHANGED = AugmentConfig()


@dataclass(frozen=True)
class ResolvedData:
    """Data sets of a run; a `*_val` of None means `holdout` of the training images."""

    captions_train: tuple[Source, ...]
    captions_val: tuple[Source, ...] | None
    captions_test: tuple[Source, ...]
    vqa_train: tuple[Source, ...]
    vqa_val: tuple[Source, ...] | None
    vqa_test: tuple[Source, ...]
    holdout: float
    augment: AugmentConfig

    def captions(self) -> tuple[MixedRows, MixedRows]:
        """Caption rows to train on and to watch."""
        return _split(self.captions_train, self.captions_val, self.holdout, "captions")

    def questions(self) -> tuple[MixedRows, MixedRows]:
        """Question rows to train on and to watch."""
        return _split(self.vqa_train, self.vqa_val, self.holdout, "questions")


def resolve(data: DataConfig, demo_root: Path) -> ResolvedData:
    """Data sets of a run; the demo world lies in `demo_root` unless the recipe names a root of its own."""
    root = data.root if data.root is not None else demo_root

    def sources(configs: Sequence[SourceConfig]) -> tuple[Source, ...]:
        return tuple(resolve_source(config, root) for config in configs)

    return ResolvedData(
        captions_train=sources(data.captions_train),
        captions_val=None if data.captions_val is None else sources(data.captions_val),
        captions_test=sources(data.captions_test),
        vqa_train=sources(data.vqa_train),
        vqa_val=None if data.vqa_val is None else sources(data.vqa_val),
        vqa_test=sources(data.vqa_test),
        holdout=data.holdout,
        augment=data.augment,
    )


def _split(
    train: tuple[Source, ...], val: tuple[Source, ...] | None, holdout: float, purpose: Purpose
) -> tuple[MixedRows, MixedRows]:
    if val is None:
        return split_rows(train, holdout, purpose)
    return open_rows(train, purpose), open_rows(val, purpose)


# Shape letters: B rows, N image tokens, E image width
class FeatureSource(Protocol):
    """Where the frozen tower's output comes from: memory (`FeatureStore`) or a folder (`trainer.features`)."""

    broken: dict[Path, str]
    """Images that cannot be read, and why."""

    def prepare(self, vision: VisionTower, paths: Sequence[Path], progress: Progress) -> None:
        """Be told what will be asked for, and make ahead what is worth it."""
        ...

    def ahead(self, vision: VisionTower, paths: Sequence[Path]) -> None:
        """Be told what `many` will be asked for next."""
        ...

    def many(self, vision: VisionTower, paths: Sequence[Path]) -> list[Tensor | None]:
        """Features [N, E] of each image; None for one that cannot be read."""
        ...

    def statistics(self) -> dict[str, int]:
        """What was found and what was made, for metrics.json; nothing where it says nothing."""
        ...


class FeatureStore:
    """Frozen tower output by image, made once for as many images as fit in memory; one store serves one tower.

    Stages of one process share a store, so an image passes the frozen tower once in a whole run.
    """

    def __init__(self) -> None:
        self._features: dict[Path, Tensor] = {}
        self._bytes = 0
        self.broken: dict[Path, str] = {}
        """Images that cannot be read, and why."""

    def prepare(self, vision: VisionTower, paths: Sequence[Path], progress: Progress) -> None:
        """Encode those of `paths` that are not here yet, until memory is used up."""
        absent = [path for path in dict.fromkeys(paths) if path not in self._features and path not in self.broken]
        chunks = [absent[start : start + ENCODE_BATCH] for start in range(0, len(absent), ENCODE_BATCH)]
        if not chunks:
            return
        with progress.bar("image features", len(chunks), items_per_step=ENCODE_BATCH) as bar:
            for chunk in chunks:
                if self._bytes > FEATURE_BYTES:
                    return
                pixels = {path: pixel for path in chunk if (pixel := self.pixels(vision, path)) is not None}
                for path, features_NE in zip(pixels, encode(vision, list(pixels.values())), strict=True):
                    self._features[path] = features_NE
                    self._bytes += features_NE.numel() * features_NE.element_size()
                bar.advance()

    def many(self, vision: VisionTower, paths: Sequence[Path]) -> list[Tensor | None]:
        """Features [N, E] of each image; None for one that cannot be read. What was not made ahead is made now."""
        absent = [path for path in dict.fromkeys(paths) if path not in self._features and path not in self.broken]
        with ThreadPoolExecutor(WORKERS) as pool:
            read = zip(absent, pool.map(lambda path: self.pixels(vision, path), absent), strict=True)
            pixels = {path: pixel for path, pixel in read if pixel is not None}
        made = dict(zip(pixels, encode(vision, list(pixels.values())), strict=True))
        return [self._features[path] if path in self._features else made.get(path) for path in paths]

    def ahead(self, vision: VisionTower, paths: Sequence[Path]) -> None:
        """Nothing to do: they are in memory."""

    def statistics(self) -> dict[str, int]:
        """Nothing: what is kept in memory ends with the process."""
        return {}

    def pixels(self, vision: VisionTower, path: Path) -> np.ndarray | None:
        """Pixels [3, H, W], or None for an image noted in `broken`."""
        if path in self.broken:
            return None
        try:
            return preprocess(path, vision.preprocess)
        except (ImageError, MissingFile) as error:
            self.broken[path] = str(error)
            return None


@torch.no_grad()
def encode(vision: VisionTower, pixels: list[np.ndarray]) -> Tensor:
    """Tower output [B, N, E] of B images; none for none."""
    if not pixels:
        return torch.empty(0)
    return vision(torch.from_numpy(np.stack(pixels)).to(next(vision.parameters()).device))


@dataclass(frozen=True)
class Taken:
    """What was read since it was last asked."""

    image_ids: tuple[str, ...]
    seconds: float
    cut: int
    """Places of the step whose row has a text of more than 50 words, of which training sees the first 50."""


class ImageRows:
    """Rows with their image features; a row that cannot be read gives way to the next, so batches stay full.

    Features of a frozen tower come from the store. Images that are changed at random, that a trained tower reads, or
    that are too many to be kept in memory are read by background threads and pass the tower in the step.
    """

    def __init__(
        self,
        vision: VisionTower,
        rows: Sequence[Row],
        store: FeatureSource,
        progress: Progress,
        augment: AugmentConfig = UNCHANGED,
    ) -> None:
        self._vision, self._store = vision, store
        self.rows = rows
        self._reader = PixelReader(rows, vision.preprocess, augment)
        self._trained = any(parameter.requires_grad for parameter in vision.parameters())
        many = len(rows) > AHEAD_ROWS
        self._live = self._trained or augment.active or (many and isinstance(store, FeatureStore))
        self._taken: list[str] = []
        self._seconds = 0.0
        self._cut = set[int]()
        """Places of the global batch, so that a row that is read twice in a step counts once."""
        self.left_out = sum(part.left_out for part in rows.parts) if isinstance(rows, MixedRows) else 0
        """Entries of the data sets that are no rows, as something of them is missing or wrong."""
        paths = list[Path]() if many else [row.image for row in rows]
        self._paths = set(paths)
        if self._live and not isinstance(store, FeatureStore):
            raise InputError(
                "data.features.folder: features are kept of a frozen image encoder and of images that are not changed "
                "at random; set it to null for this stage"
            )
        if self._live:
            return
        store.prepare(vision, paths, progress)
        if paths and all(path in store.broken for path in paths):
            raise DataError(
                f"none of the {len(set(paths))} images of {paths[0].parent} can be read; "
                f"the first says: {store.broken[paths[0]]}"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def at_step(self, step: int, batch_size: int, seed: int) -> list[int]:
        """Row indices of the global batch of a step (0-based), from all data sets of a mixture."""
        parts = self.rows.parts if isinstance(self.rows, MixedRows) else ()
        sizes = [len(part.rows) for part in parts] or [len(self.rows)]
        return mixed_rows_at(step, batch_size, sizes, [part.weight for part in parts], seed)

    def any_row(self, rng: np.random.Generator) -> int:
        """A row drawn evenly from a data set that is drawn by weight."""
        parts = self.rows.parts if isinstance(self.rows, MixedRows) else ()
        if len(parts) < 2:
            return int(rng.integers(len(self.rows)))
        weights = np.array([part.weight for part in parts])
        chosen = int(rng.choice(len(parts), p=weights / weights.sum()))
        return sum(len(part.rows) for part in parts[:chosen]) + int(rng.integers(len(parts[chosen].rows)))

    def broken(self) -> dict[str, str]:
        """Images and lines of these rows that could not be read, and why."""
        kept = {str(path): why for path, why in self._store.broken.items() if path in self._paths}
        return dict(sorted((kept | self._reader.broken).items()))

    def ahead(self, indices: Sequence[int], draws: StepDraws) -> None:
        """Begin to read the images, or their kept features, that the next step will ask for."""
        if self._live:
            self._reader.ahead(indices, draws)
        else:
            rows = [self._reader.row(index) for index in indices]
            self._store.ahead(self._vision, [row.image for row in rows if row is not None])

    def batch(self, indices: Sequence[int], draws: StepDraws | None) -> tuple[list[Row], Tensor]:
        """The rows at `indices` (broken ones replaced) and their features [B, N, E], before the trained LayerNorm.

        `draws` are those of the step, a generator per row; None when something is measured, with nothing random. The
        features carry a gradient when the tower is trained.
        """
        began = time.monotonic()
        if self._live:
            read = self._reader.batch(indices, draws)
            self._seconds += time.monotonic() - began
            rows, features_BNE = [row for row, _ in read], self._encoded([pixels for _, pixels in read])
        else:
            rows, features_BNE = self._kept(indices)
            self._seconds += time.monotonic() - began
        self._taken += [row.image_id for row in rows]
        if draws is not None:
            self._cut |= {draws.place(b) for b, row in enumerate(rows) if _is_long(row)}
        return rows, features_BNE

    def take(self) -> Taken:
        """Images and reading time of the batches since the last call."""
        taken = Taken(tuple(self._taken), self._seconds, len(self._cut))
        self._taken, self._seconds, self._cut = [], 0.0, set()
        return taken

    def _encoded(self, pixels: list[np.ndarray]) -> Tensor:
        if not self._trained:
            return encode(self._vision, pixels)
        device = next(self._vision.parameters()).device
        features_BNE: Tensor = self._vision(torch.from_numpy(np.stack(pixels)).to(device))
        return features_BNE

    def _kept(self, indices: Sequence[int]) -> tuple[list[Row], Tensor]:
        """`batch` from the store."""
        rows = [self._reader.row(index) for index in indices]
        found = iter(self._store.many(self._vision, [row.image for row in rows if row is not None]))
        pairs = [(row, None if row is None else next(found)) for row in rows]
        readable = [
            (row, features_NE) if row is not None and features_NE is not None else self._readable_after(index)
            for index, (row, features_NE) in zip(indices, pairs, strict=True)
        ]
        return [row for row, _ in readable], torch.stack([features_NE for _, features_NE in readable])

    def _readable_after(self, index: int) -> tuple[Row, Tensor]:
        """The next row that can be read, and its features."""
        self._paths |= {row.image} if (row := self._reader.row(index)) is not None else set()
        for offset in range(1, min(len(self.rows), TRIES)):
            row = self._reader.row((index + offset) % len(self.rows))
            features_NE = None if row is None else self._store.many(self._vision, [row.image])[0]
            if row is not None and features_NE is not None:
                return row, features_NE
            self._paths |= set() if row is None else {row.image}
        raise DataError(
            f"none of {min(len(self.rows), TRIES)} rows from row {index} on can be read; run `qforge data check`"
        )


def _is_long(row: Row) -> bool:
    return any(len(text.split()) > MAX_WORDS for text in (*row.captions, row.question or ""))
