"""Frozen image features for training that a folder keeps from run to run (trainer/feature_cache.py).

    qforge data features recipes/mine.yaml --set data.features.folder=features     # all of them, ahead
    qforge train recipes/mine.yaml --set data.features.folder=features --out run   # or each when it is first met

Every feature that training meets was rounded to half precision, also where it was just made or finds no room, so an
image is the same in every epoch, stage and run. What is absent is computed in fp32, whatever the stage computes in.
Which images pass the tower together is told by what is absent, and the last bit of a feature by that: where several
processes fill a cache while they train, runs may differ by it. An interrupted run of one process goes on bit for bit,
and so does any run whose features were made ahead.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.errors import ImageError, InputError
from runtime.preprocess import preprocess
from runtime.progress import Progress
from trainer.config import FeaturesConfig
from trainer.data import ENCODE_BATCH, encode
from trainer.feature_cache import FeatureCache, Halves, Statistics
from trainer.feature_key import encoded, image_digest, tower_facts
from trainer.towers import VisionTower

GB = 10**9


def cached_features(settings: FeaturesConfig) -> "CachedFeatures":
    """The cache that a recipe asks for.

    Raises:
        InputError: it asks for none.
    """
    if settings.folder is None:
        raise InputError("data.features.folder: expected a folder to keep image features in, found null; name one")
    return CachedFeatures(settings.folder, round(settings.limit_gb * GB))


# Shape letters: B images, N image tokens, E image width
class CachedFeatures:
    """A `trainer.data.FeatureSource` whose features lie in a folder of at most `limit_bytes`."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit_bytes = folder, limit_bytes
        self._opened: tuple[VisionTower, FeatureCache] | None = None
        self._before = Statistics()
        self.broken: dict[Path, str] = {}
        """Images that cannot be read, and why."""

    def prepare(self, vision: VisionTower, paths: Sequence[Path], progress: Progress) -> None:
        """Open the folder; images come when they are asked for, since hashing millions of files takes hours.

        Raises:
            InputError: a tower that is trained, or a folder that cannot be used.
        """
        self._cache(vision)

    def fill(self, vision: VisionTower, paths: Sequence[Path], progress: Progress) -> None:
        """Make what is absent, with a bar; raises as `many`."""
        paths = list(dict.fromkeys(paths))
        starts = range(0, len(paths), ENCODE_BATCH)
        with progress.bar("image features", len(starts), items_per_step=ENCODE_BATCH) as bar:
            for start in starts:
                self._halves(vision, paths[start : start + ENCODE_BATCH])
                bar.advance()
        if (full := self._cache(vision).full) is not None:
            progress.note(
                f"{full}: images beyond pass the image encoder each time they are seen. Raise data.features.limit_gb, "
                f"or delete what other image encoders left in {self._folder}"
            )

    def many(self, vision: VisionTower, paths: Sequence[Path]) -> list[Tensor | None]:
        """Features [N, E] of each image; None for one that cannot be read.

        Raises:
            InputError: features too large for half precision, or as `prepare`.
        """
        device = next(vision.parameters()).device
        return [
            None if halves is None else torch.from_numpy(halves).to(device).float()
            for halves in self._halves(vision, paths)
        ]

    def statistics(self) -> dict[str, int]:
        """Hits, misses and images stored by this process, bytes in the folder."""
        now = self._before.as_json()
        if self._opened is not None:
            own = self._opened[1].statistics.as_json()
            now = {name: own[name] if name == "bytes" else now[name] + own[name] for name in now}
        return now

    def _cache(self, vision: VisionTower) -> FeatureCache:
        """The part of the folder that is this tower's; opened anew for another tower, which every stage loads."""
        if self._opened is None or self._opened[0] is not vision:
            facts = tower_facts(vision)
            if self._opened is not None:
                self._before = Statistics(**self.statistics())
                self._opened[1].close()
            self._opened = vision, FeatureCache(self._folder, facts, self._limit_bytes)
        return self._opened[1]

    def _halves(self, vision: VisionTower, paths: Sequence[Path]) -> list[Halves | None]:
        """Features [N, E] in half precision, from the folder or made now."""
        cache, found = self._cache(vision), dict[bytes, Halves]()
        sources = {path: source for path in dict.fromkeys(paths) if (source := self._source(path)) is not None}
        digest_of = {path: image_digest(source) for path, source in sources.items()}
        path_of = {digest: path for path, digest in digest_of.items()}
        digests = list(path_of)
        found |= {digests[place]: halves for place, halves in cache.read(digests).items()}
        pixels = dict[bytes, Any]()
        for digest in digests:
            if digest not in found and (values := self._pixels(vision, path_of[digest], sources)) is not None:
                pixels[digest] = values
        found |= self._made(vision, cache, pixels, path_of)
        return [found.get(digest_of[path]) if path in digest_of else None for path in paths]

    def _made(
        self, vision: VisionTower, cache: FeatureCache, pixels: dict[bytes, Any], path_of: dict[bytes, Path]
    ) -> dict[bytes, Halves]:
        """What the tower gives for these, kept from now on."""
        made, digests = dict[bytes, Halves](), list(pixels)
        for start in range(0, len(digests), ENCODE_BATCH):
            chunk = digests[start : start + ENCODE_BATCH]
            with torch.autocast(next(vision.parameters()).device.type, enabled=False):
                features_BNE = encode(vision, [pixels[digest] for digest in chunk]).half().cpu().numpy()
            for digest, halves in zip(chunk, features_BNE, strict=True):
                if not np.isfinite(halves).all():
                    raise InputError(
                        f"{path_of[digest]}: a feature is not a number or too large for half precision, so features of "
                        f"this image encoder cannot be kept; set data.features.folder to null"
                    )
            cache.write(chunk, features_BNE)
            made |= dict(zip(chunk, features_BNE, strict=True))
        return made

    def _source(self, path: Path) -> bytes | None:
        if path in self.broken:
            return None
        try:
            return encoded(path)
        except ImageError as error:
            self.broken[path] = str(error)
            return None

    def _pixels(self, vision: VisionTower, path: Path, sources: dict[Path, bytes]) -> Any:
        """Pixels [3, H, W]; None for what cannot be read as an image, under whatever paths it was met."""
        try:
            return preprocess(sources[path], vision.preprocess)
        except ImageError as error:
            same = [other for other, source in sources.items() if source == sources[path]]
            self.broken |= {other: f"{other}{str(error).removeprefix('image bytes')}" for other in same}
            return None
