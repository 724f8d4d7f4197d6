"""Frozen image features for training that a folder keeps from run to run (trainer/feature_cache.py).

    qforge data features recipes/mine.yaml --set data.features.folder=features     # all of them, ahead
    qforge train recipes/mine.yaml --set data.features.folder=features --out run   # or each when it is first met

Every feature that training meets was rounded to half precision, also where it was just made or finds no room, so an
image is the same in every epoch, stage and run. What is absent is computed in fp32, whatever the stage computes in.
Which images pass the tower together is told by what is absent, and the last bit of a feature by that: where several
processes fill a cache while they train, runs may differ by it. An interrupted run of one process goes on bit for bit,
and so does any run whose features were made ahead.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtime.errors import ImageError, InputError
from runtime.preprocess import preprocess
from runtime.progress import Progress
from trainer.data import ENCODE_BATCH, encode
from trainer.data_config import FeaturesConfig
from trainer.feature_cache import FeatureCache, Halves, Statistics
from trainer.feature_key import encoded, image_digest, tower_facts
from trainer.pixels import WORKERS, Pixels
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
        self._reader = ThreadPoolExecutor(1, "features")
        self._waiting: list[tuple[set[Path], Future[tuple[_Read, dict[bytes, Halves]]]]] = []
        """What is read ahead: of the step that comes, and of the one behind it."""
        self._progress: Progress | None = None
        self._said_full = False
        self.broken: dict[Path, str] = {}
        """Images that cannot be read, and why."""

    def prepare(self, vision: VisionTower, paths: Sequence[Path], progress: Progress) -> None:
        """Open the folder; images come when they are asked for, since hashing millions of files takes hours.

        Raises:
            InputError: a tower that is trained, or a folder that cannot be used.
        """
        self._progress = progress
        self._cache(vision)

    def fill(self, vision: VisionTower, paths: Iterable[Path], count: int, progress: Progress) -> None:
        """Make what is absent of `count` images, with a bar; one that comes again is looked up again.

        Raises:
            InputError: as `many`.
        """
        self._progress, waiting = progress, iter(paths)
        with progress.bar("image features", -(-count // ENCODE_BATCH), items_per_step=ENCODE_BATCH) as bar:
            while chunk := list(islice(waiting, ENCODE_BATCH)):
                read = self._read(chunk)
                cache = self._cache(vision)
                there = cache.has(list(read.path_of))
                self._made(vision, cache, [digest for digest in read.path_of if digest not in there], read)
                bar.advance()

    def ahead(self, vision: VisionTower, paths: Sequence[Path]) -> None:
        """Begin to read what is there of the images that the next step asks for; what is absent waits for it."""
        lookup = self._reader.submit(self._looked_up, self._cache(vision), paths)
        self._waiting = [*self._waiting[-1:], (set(paths), lookup)]

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
                wait([lookup for _, lookup in self._waiting])
                self._waiting = []
                self._before = Statistics(**self.statistics())
                self._opened[1].close()
            self._opened = vision, FeatureCache(self._folder, facts, self._limit_bytes)
        return self._opened[1]

    def _halves(self, vision: VisionTower, paths: Sequence[Path]) -> list[Halves | None]:
        """Features [N, E] in half precision, from the folder or made now."""
        cache = self._cache(vision)
        early = [place for place, (known, _) in enumerate(self._waiting) if known.issuperset(paths)]
        if early:
            known, found = self._waiting.pop(early[0])[1].result()
            read = known.only(paths)
            absent = [digest for digest in read.path_of if digest not in found]
            found |= _by_digest(absent, cache.read(absent))  # the step before may have made them
        else:
            read, found = self._looked_up(cache, paths)
        found |= self._made(vision, cache, [digest for digest in read.path_of if digest not in found], read)
        return [found.get(read.digest_of[path]) if path in read.digest_of else None for path in paths]

    def _looked_up(self, cache: FeatureCache, paths: Sequence[Path]) -> "tuple[_Read, dict[bytes, Halves]]":
        """The encoded images, and the features that are there."""
        read = self._read(paths)
        digests = list(read.path_of)
        return read, _by_digest(digests, cache.read(digests))

    def _made(
        self, vision: VisionTower, cache: FeatureCache, digests: list[bytes], read: "_Read"
    ) -> dict[bytes, Halves]:
        """What the tower gives for these images, kept from now on; broken ones are left out."""
        made = dict[bytes, Halves]()
        with ThreadPoolExecutor(WORKERS, "images") as pool:
            decoded = pool.map(lambda digest: self._pixels(vision, read, digest), digests)
            pixels = {digest: values for digest, values in zip(digests, decoded, strict=True) if values is not None}
        for start in range(0, len(pixels), ENCODE_BATCH):
            chunk = list(pixels)[start : start + ENCODE_BATCH]
            with torch.no_grad(), torch.autocast(next(vision.parameters()).device.type, enabled=False):
                features_BNE = encode(vision, [pixels[digest] for digest in chunk]).half().cpu().numpy()
            for digest, halves in zip(chunk, features_BNE, strict=True):
                if not np.isfinite(halves).all():
                    raise InputError(
                        f"{read.path_of[digest]}: a feature is not a number or too large for half precision, so "
                        f"features of this image encoder cannot be kept; set data.features.folder to null"
                    )
            cache.write(chunk, features_BNE)
            self._say_if_full(cache)
            made |= dict(zip(chunk, features_BNE, strict=True))
        return made

    def _say_if_full(self, cache: FeatureCache) -> None:
        """Once, when there is no more room."""
        if cache.full is not None and not self._said_full and self._progress is not None:
            self._said_full = True
            self._progress.note(
                f"{cache.full}: images beyond pass the image encoder each time they are seen. Raise "
                f"data.features.limit_gb, or delete what other image encoders left in {self._folder}"
            )

    def _read(self, paths: Sequence[Path]) -> "_Read":
        """The encoded images, each file once; what cannot be read is noted."""
        wanted = [path for path in dict.fromkeys(paths) if path not in self.broken]
        with ThreadPoolExecutor(WORKERS, "images") as pool:
            contents = dict(zip(wanted, pool.map(self._content, wanted), strict=True))
        digest_of = {path: image_digest(content) for path, content in contents.items() if content is not None}
        path_of = {digest: path for path, digest in digest_of.items()}
        return _Read(digest_of, path_of, {digest: contents[path] or b"" for digest, path in path_of.items()})

    def _content(self, path: Path) -> bytes | None:
        try:
            return encoded(path)
        except ImageError as error:
            self.broken[path] = str(error)
            return None

    def _pixels(self, vision: VisionTower, read: "_Read", digest: bytes) -> Pixels | None:
        """Pixels [3, H, W]; None for what cannot be read as an image, noted under every path it was met at."""
        try:
            return preprocess(read.content_of[digest], vision.preprocess)
        except ImageError as error:
            same = [path for path, other in read.digest_of.items() if other == digest]
            self.broken |= {path: f"{path}{str(error).removeprefix('image bytes')}" for path in same}
            return None


def _by_digest(digests: Sequence[bytes], found: dict[int, Halves]) -> dict[bytes, Halves]:
    return {digests[place]: halves for place, halves in found.items()}


@dataclass(frozen=True)
class _Read:
    """Encoded images."""

    digest_of: dict[Path, bytes]
    path_of: dict[bytes, Path]
    """One of the paths of each different image."""
    content_of: dict[bytes, bytes]

    def only(self, paths: Sequence[Path]) -> "_Read":
        """Of these images alone."""
        digest_of = {path: self.digest_of[path] for path in paths if path in self.digest_of}
        kept = set(digest_of.values())
        return _Read(
            digest_of,
            {digest: path for digest, path in self.path_of.items() if digest in kept},
            {digest: content for digest, content in self.content_of.items() if digest in kept},
        )
