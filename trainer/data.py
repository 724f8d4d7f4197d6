"""Rows and frozen image features for training: which rows a step sees is a function of seed and step alone.

Nothing about the order is remembered, so a resumed run sees what an uninterrupted one would have seen.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtime.dataset import Row, read_manifest
from runtime.errors import DataError, ImageError, MissingFile
from runtime.preprocess import preprocess
from runtime.progress import Progress
from trainer.config import DataConfig
from trainer.draws import StepDraws
from trainer.towers import VisionTower

ENCODE_BATCH = 64
"""Images that pass the frozen tower together when features are made ahead."""
FEATURE_BYTES = 2 * 2**30
"""Most memory that features made ahead may take; images beyond pass the tower again each time they are seen."""


@dataclass(frozen=True)
class ResolvedData:
    """Manifests of a run; a `*_val` of None means `holdout` of the training images."""

    captions_train: Path
    captions_val: Path | None
    captions_test: Path
    vqa_train: Path
    vqa_val: Path | None
    vqa_test: Path
    holdout: float

    def captions(self) -> tuple[list[Row], list[Row]]:
        """Caption rows to train on and to watch."""
        return _split(self.captions_train, self.captions_val, self.holdout)

    def questions(self) -> tuple[list[Row], list[Row]]:
        """Question rows to train on and to watch."""
        return _split(self.vqa_train, self.vqa_val, self.holdout)


def resolve(data: DataConfig, demo_root: Path) -> ResolvedData:
    """Manifest paths of a run; the demo world lies in `demo_root` unless the recipe names a root of its own."""
    root = data.root if data.root is not None else demo_root

    def path(name: str | None) -> Path | None:
        return None if name is None else root / name

    return ResolvedData(
        captions_train=root / data.captions_train,
        captions_val=path(data.captions_val),
        captions_test=root / data.captions_test,
        vqa_train=root / data.vqa_train,
        vqa_val=path(data.vqa_val),
        vqa_test=root / data.vqa_test,
        holdout=data.holdout,
    )


def _split(train: Path, val: Path | None, holdout: float) -> tuple[list[Row], list[Row]]:
    rows = read_manifest(train)
    if val is not None:
        return rows, read_manifest(val)
    watched = [row for row in rows if _share(row.image_id) < holdout]
    kept = [row for row in rows if _share(row.image_id) >= holdout]
    if not watched or not kept:
        raise DataError(
            f"{train}: holding out {holdout:.0%} of its images leaves {len(kept)} rows to train on "
            f"and {len(watched)} to watch; both need some. Name a validation manifest or change data.holdout"
        )
    return kept, watched


def _share(image_id: str) -> float:
    """A number in [0, 1) that depends on the image id alone, so all rows of an image fall on one side."""
    return int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "big") / 2**64


# Shape letters: B rows, N image tokens, E image width
class FeatureStore:
    """Frozen tower output by image, made once for as many images as fit in memory; one store serves one tower.

    Stages of one process share a store, so an image passes the frozen tower once in a whole run.
    """

    def __init__(self) -> None:
        self._features: dict[Path, Tensor] = {}
        self._bytes = 0
        self.broken: dict[Path, str] = {}
        """Images that cannot be read, and why."""

    def fill(self, vision: VisionTower, paths: Sequence[Path], progress: Progress) -> None:
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

    def get(self, vision: VisionTower, path: Path) -> Tensor | None:
        """Features [N, E] of an image, encoded now when they were not made ahead; None when it cannot be read."""
        if path in self._features:
            return self._features[path]
        pixels = self.pixels(vision, path)
        return None if pixels is None else encode(vision, [pixels])[0]

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


class ImageRows:
    """Rows with their image features; a row whose image cannot be read gives way to the next, so batches stay full."""

    def __init__(self, vision: VisionTower, rows: Sequence[Row], store: FeatureStore, progress: Progress) -> None:
        self._vision, self._store = vision, store
        self.rows = rows
        self._taken: list[str] = []
        self._seconds = 0.0
        paths = [row.image for row in rows]
        store.fill(vision, paths, progress)
        if all(path in store.broken for path in paths):
            raise DataError(
                f"none of the {len(set(paths))} images of {paths[0].parent} can be read; "
                f"the first says: {store.broken[paths[0]]}"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def broken(self) -> dict[str, str]:
        """Images of these rows that could not be read, and why."""
        found = {row.image for row in self.rows} & self._store.broken.keys()
        return {str(path): self._store.broken[path] for path in sorted(found)}

    def batch(self, indices: Sequence[int], draws: StepDraws | None) -> tuple[list[Row], Tensor]:
        """The rows at `indices` (broken ones replaced) and their features [B, N, E], before the trained LayerNorm.

        `draws` are those of the step, a generator per row; None when something is measured, with nothing random.
        """
        began = time.monotonic()
        rows, features = zip(*(self._readable(index) for index in indices), strict=True)
        features_BNE = torch.stack(features)
        self._taken += [row.image_id for row in rows]
        self._seconds += time.monotonic() - began
        return list(rows), features_BNE

    def take(self) -> Taken:
        """Images and reading time of the batches since the last call."""
        taken = Taken(tuple(self._taken), self._seconds)
        self._taken, self._seconds = [], 0.0
        return taken

    def _readable(self, index: int) -> tuple[Row, Tensor]:
        for offset in range(len(self.rows)):
            row = self.rows[(index + offset) % len(self.rows)]
            features_NE = self._store.get(self._vision, row.image)
            if features_NE is not None:
                return row, features_NE
        raise DataError(f"no image of {len(self.rows)} rows can be read; run `qforge data check` on the manifest")


def rows_at(step: int, batch_size: int, row_count: int, seed: int) -> list[int]:
    """Row indices of one step: consecutive pieces of an endless sequence of shuffled epochs."""
    first = step * batch_size
    epochs = range(first // row_count, (first + batch_size - 1) // row_count + 1)
    order = {epoch: np.random.default_rng([seed, epoch]).permutation(row_count) for epoch in epochs}
    return [int(order[place // row_count][place % row_count]) for place in range(first, first + batch_size)]
