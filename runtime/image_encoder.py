"""Pixels → prefix: vision tower, Q-Former and projection, through the query cache.

Two things are worth remembering. The prefix of an image (and of its question, where the question conditions the
queries) spares both graphs. The vision features of an image spare the larger one when a new question is asked; they
are kept only in bundles whose Q-Former reads the question, because elsewhere the prefix says it all.

Shape letters: B images, C colour channels, H height, W width, N image patches, E vision width, Q queries,
D language width, T question tokens
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends import Engine
from runtime.manifest import Manifest
from runtime.query_cache import QueryCache, cache_key
from runtime.stopwatch import Stopwatch

Floats = npt.NDArray[np.float32]
Rows = Sequence[int]


class ImageEncoder:
    """Chains the graphs `vision` and `qformer`; each distinct image of a batch is encoded once."""

    def __init__(self, vision: Engine, qformer: Engine, cache: QueryCache, manifest: Manifest) -> None:
        """The engines stay the caller's to close."""
        self._vision = vision
        self._qformer = qformer
        self._cache = cache
        self._question_conditioned = manifest.model.question_conditioned
        self._identity = {"bundle": manifest.digest, "preprocess": manifest.preprocess.model_dump_json()}

    def encode(self, pixels_BCHW: Floats, questions: Sequence[Sequence[int] | None], watch: Stopwatch) -> Floats:
        """Return prefix_BQD.

        `questions` holds each row's question ids for the Q-Former; None for a caption, and wherever the Q-Former does
        not read questions, so that an image has one prefix there.
        """
        with watch.phase("preprocess"):
            image_keys = [self._key("image_embeds", pixels, None) for pixels in pixels_BCHW]
            prefix_keys = [self._key("prefix", pixels, ids) for pixels, ids in zip(pixels_BCHW, questions, strict=True)]

        def prefixes_of(rows: Rows) -> Floats:
            with watch.phase("vision"):
                embeds_BNE = self._image_embeds(pixels_BCHW[list(rows)], [image_keys[row] for row in rows])
            with watch.phase("qformer"):
                return self._prefix(embeds_BNE, [questions[row] for row in rows])

        return np.stack(self._remembered(prefix_keys, prefixes_of))

    def _image_embeds(self, pixels_BCHW: Floats, keys: Sequence[str]) -> Floats:
        def features_of(rows: Rows) -> Floats:
            embeds_BNE: Floats = self._vision.run({"pixels": pixels_BCHW[list(rows)]})["image_embeds"]
            return embeds_BNE

        if not self._question_conditioned:
            return features_of(range(len(keys)))
        return np.stack(self._remembered(keys, features_of))

    def _prefix(self, embeds_BNE: Floats, questions: Sequence[Sequence[int] | None]) -> Floats:
        feeds: dict[str, npt.NDArray[Any]] = {"image_embeds": embeds_BNE}
        if self._question_conditioned:
            feeds["question_ids"], feeds["question_mask"] = pad_questions(questions)
        prefix_BQD: Floats = self._qformer.run(feeds)["prefix"]
        return prefix_BQD

    def _remembered(self, keys: Sequence[str], compute: Callable[[Rows], Floats]) -> list[Floats]:
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

    def _key(self, stored: str, pixels_CHW: Floats, question: Sequence[int] | None) -> str:
        asked = {} if question is None else {"question_ids": question}
        return cache_key({"stored": stored, **self._identity, "pixels": pixels_CHW, **asked})


def pad_questions(questions: Sequence[Sequence[int] | None]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(question_ids_BT, question_mask_BT): padded on the right; None becomes a row that is masked throughout."""
    longest = max([1, *(len(ids) for ids in questions if ids is not None)])
    ids_BT = np.zeros((len(questions), longest), np.int64)
    mask_BT = np.zeros_like(ids_BT)
    for row, ids in enumerate(questions):
        if ids is not None:
            ids_BT[row, : len(ids)] = ids
            mask_BT[row, : len(ids)] = 1
    return ids_BT, mask_BT
