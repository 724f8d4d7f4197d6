"""What was made of images, kept in the query cache; who asks for the same of the same image finds it there.

Answering and searching both keep vision features here, under one key: an image that was asked about is searched with
at no cost of vision, and the other way round.

Shape letters: C colour channels, H height, W width
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from runtime.manifest import Manifest
from runtime.query_cache import Cache, cache_key

Floats = npt.NDArray[np.float32]
Rows = Sequence[int]

IMAGE_EMBEDS = "image_embeds"
"""Vision features [N, E] of an image."""
PREFIX = "prefix"
"""What the language model reads of an image, and of its question where that conditions the queries: [Q, D]."""
IMAGE_FEATURES = "image_features"
"""Unit-length contrastive features [Q, F] of an image."""


class ImageMemory:
    """The query cache as one bundle uses it. Safe to share between threads."""

    def __init__(self, cache: Cache, manifest: Manifest) -> None:
        self._cache = cache
        self._identity = {"bundle": manifest.digest, "preprocess": manifest.preprocess.model_dump_json()}

    def key(self, stored: str, pixels_CHW: Floats, question: Sequence[int] | None = None) -> str:
        """Of one kind of result, made from these pixels and these question ids; None for no question."""
        asked = {} if question is None else {"question_ids": question}
        return cache_key({"stored": stored, **self._identity, "pixels": pixels_CHW, **asked})

    def __contains__(self, key: str) -> bool:
        return key in self._cache

    def put(self, key: str, array: Floats) -> None:
        """Keep a copy, if there is room for it."""
        self._cache.put(key, array)

    def remembered(self, keys: Sequence[str], compute: Callable[[Rows], Iterable[Floats]]) -> list[Floats]:
        """One array per key: from the cache, or computed for the first row of each distinct key that is not there."""
        known: dict[str, Floats] = {}
        missing: dict[str, int] = {}
        for row, key in enumerate(keys):
            if key in known or key in missing:
                continue
            array = self._cache.get(key)
            if array is None:
                missing[key] = row
            else:
                known[key] = array
        if missing:
            for key, array in zip(missing, compute(list(missing.values())), strict=True):
                known[key] = array
                self._cache.put(key, array)
        return [known[key] for key in keys]
