"""Rows and frozen image features for training: which rows a step sees is a function of seed and step alone.

Nothing about the order is remembered, so a resumed run sees what an uninterrupted one would have seen.
"""

import hashlib
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
class ImageFeatures:
    """Frozen tower output of a list of rows: made once for as many images as fit in memory, else on the fly.

    Rows whose image cannot be read are replaced by the next readable row, so batches stay full; `broken` says
    which, for the report at the end.
    """

    def __init__(self, vision: VisionTower, rows: Sequence[Row], progress: Progress) -> None:
        self._vision = vision
        self._rows = rows
        self._device = next(vision.parameters()).device
        self.broken: dict[Path, str] = {}
        paths = list(dict.fromkeys(row.image for row in rows))
        self._position: dict[Path, int] = {}
        self._cached = self._make(paths, progress)

    def _make(self, paths: list[Path], progress: Progress) -> Tensor:
        chunks: list[Tensor] = []
        stored_bytes = 0
        with progress.bar("image features", -(-len(paths) // ENCODE_BATCH), items_per_step=ENCODE_BATCH) as bar:
            for start in range(0, len(paths), ENCODE_BATCH):
                pixels = {
                    path: pixel
                    for path in paths[start : start + ENCODE_BATCH]
                    if (pixel := self._pixels(path)) is not None
                }
                if pixels:
                    chunk = self._encode(list(pixels.values()))
                    self._position |= {path: len(self._position) + i for i, path in enumerate(pixels)}
                    chunks.append(chunk)
                    stored_bytes += chunk.numel() * chunk.element_size()
                bar.advance()
                if stored_bytes > FEATURE_BYTES:
                    break
        if not chunks:
            first, why = next(iter(self.broken.items()))
            raise DataError(f"none of the {len(paths)} images of {first.parent} can be read; the first says: {why}")
        return torch.cat(chunks)

    def _pixels(self, path: Path) -> np.ndarray | None:
        try:
            return preprocess(path, self._vision.preprocess)
        except (ImageError, MissingFile) as error:
            self.broken[path] = str(error)
            return None

    @torch.no_grad()
    def _encode(self, pixels: list[np.ndarray]) -> Tensor:
        return self._vision(torch.from_numpy(np.stack(pixels)).to(self._device))

    def batch(self, indices: Sequence[int]) -> tuple[list[Row], Tensor]:
        """The rows at `indices` (broken ones replaced) and their features [B, N, E]."""
        rows, features = zip(*(self._readable(index) for index in indices), strict=True)
        return list(rows), torch.stack(features)

    def _readable(self, index: int) -> tuple[Row, Tensor]:
        for offset in range(len(self._rows)):
            row = self._rows[(index + offset) % len(self._rows)]
            if row.image in self.broken:
                continue
            position = self._position.get(row.image)
            if position is not None:
                return row, self._cached[position]
            pixels = self._pixels(row.image)
            if pixels is not None:
                return row, self._encode([pixels])[0]
        raise DataError(f"no image of {len(self._rows)} rows can be read; run `qforge data check` on the manifest")


def rows_at(step: int, batch_size: int, row_count: int, seed: int) -> list[int]:
    """Row indices of one step: consecutive pieces of an endless sequence of shuffled epochs."""
    first = step * batch_size
    epochs = range(first // row_count, (first + batch_size - 1) // row_count + 1)
    order = {epoch: np.random.default_rng([seed, epoch]).permutation(row_count) for epoch in epochs}
    return [int(order[place // row_count][place % row_count]) for place in range(first, first + batch_size)]
