"""Pixels → prefix: vision tower, Q-Former and projection, through the query cache.

Two things are worth remembering. The prefix of an image (and of its question, where the question conditions the
queries) spares both graphs. The vision features of an image spare the larger one when a new question is asked; they
are kept only in bundles whose Q-Former reads the question, because elsewhere the prefix says it all.

A bundle may hold a third graph, `fused`: vision and Q-Former in one, for what is asked without a question. It gives the
vision features too where a question may follow, so that the cache holds the same either way.

Shape letters: B images, C colour channels, H height, W width, N image patches, E vision width, Q queries,
D language width, T question tokens
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends import Engine
from runtime.image_memory import IMAGE_EMBEDS, PREFIX, ImageMemory, Rows
from runtime.manifest import Manifest
from runtime.query_cache import Cache
from runtime.stopwatch import Stopwatch

Floats = npt.NDArray[np.float32]
FUSED = "fused"
"""The graph that makes a caption's prefix from pixels; bundles hold it when they were exported with `export.fused`."""


class ImageEncoder:
    """Chains the graphs `vision` and `qformer`; each distinct image of a batch is encoded once."""

    def __init__(
        self,
        vision: Engine | None,
        qformer: Engine | None,
        cache: Cache,
        manifest: Manifest,
        fused: Engine | None = None,
    ) -> None:
        """The engines stay the caller's to close; `vision` and `qformer` are None where `fused` does all the work."""
        self._vision = vision
        self._qformer = qformer
        self._fused = fused
        self._memory = ImageMemory(cache, manifest)
        self._question_conditioned = manifest.model.question_conditioned

    def encode(self, pixels_BCHW: Floats, questions: Sequence[Sequence[int] | None], watch: Stopwatch) -> Floats:
        """Return prefix_BQD.

        `questions` holds each row's question ids for the Q-Former; None for a caption, and wherever the Q-Former does
        not read questions, so that an image has one prefix there.
        """
        with watch.phase("preprocess"):
            image_keys = [self._memory.key(IMAGE_EMBEDS, pixels) for pixels in pixels_BCHW]
            asked = zip(pixels_BCHW, questions, strict=True)
            prefix_keys = [self._memory.key(PREFIX, pixels, ids) for pixels, ids in asked]

        def prefixes_of(rows: Rows) -> list[Floats]:
            captions = self._fusible(rows, image_keys, questions)
            found: dict[int, Floats] = {}
            if captions:
                with watch.phase("vision"):  # the Q-Former too: nobody can tell them apart there
                    prefix_BQD = self._fused_prefix(pixels_BCHW[captions], [image_keys[row] for row in captions])
                found |= dict(zip(captions, prefix_BQD, strict=True))
            others = [row for row in rows if row not in found]
            if others:
                with watch.phase("vision"):
                    embeds_BNE = self._image_embeds(pixels_BCHW[others], [image_keys[row] for row in others])
                with watch.phase("qformer"):
                    prefix_BQD = self._prefix(embeds_BNE, [questions[row] for row in others])
                found |= dict(zip(others, prefix_BQD, strict=True))
            return [found[row] for row in rows]

        return np.stack(self._memory.remembered(prefix_keys, prefixes_of))

    def remember(self, pixels_BCHW: Floats, question: Sequence[int] | None) -> int:
        """Put into the cache what these images can be asked for, `question` among it; returns how many were new."""
        keys = [[self._memory.key(PREFIX, pixels, question)] for pixels in pixels_BCHW]
        if self._question_conditioned:
            for of_image, pixels in zip(keys, pixels_BCHW, strict=True):
                of_image.append(self._memory.key(IMAGE_EMBEDS, pixels))
        new = len({of_image[0] for of_image in keys if not all(key in self._memory for key in of_image)})
        self.encode(pixels_BCHW, [question] * len(pixels_BCHW), Stopwatch())
        if self._question_conditioned:
            self._image_embeds(pixels_BCHW, [of_image[1] for of_image in keys])
        return new

    def _fusible(self, rows: Rows, image_keys: Sequence[str], questions: Sequence[Sequence[int] | None]) -> list[int]:
        """Rows without a question whose vision features are neither remembered nor needed by another row."""
        if self._fused is None:
            return []
        if self._vision is None:
            return list(rows)
        asked = {image_keys[row] for row in rows if questions[row] is not None}
        return [
            row
            for row in rows
            if questions[row] is None and image_keys[row] not in asked and image_keys[row] not in self._memory
        ]

    def _fused_prefix(self, pixels_BCHW: Floats, keys: Sequence[str]) -> Floats:
        assert self._fused is not None
        outputs = self._fused.run({"pixels": pixels_BCHW})
        for key, embeds_NE in zip(keys, outputs.get("image_embeds", ()), strict=False):
            self._memory.put(key, embeds_NE)
        prefix_BQD: Floats = outputs["prefix"]
        return prefix_BQD

    def _image_embeds(self, pixels_BCHW: Floats, keys: Sequence[str]) -> Floats:
        def features_of(rows: Rows) -> Floats:
            assert self._vision is not None
            embeds_BNE: Floats = self._vision.run({"pixels": pixels_BCHW[list(rows)]})["image_embeds"]
            return embeds_BNE

        if not self._question_conditioned:
            return features_of(range(len(keys)))
        return np.stack(self._memory.remembered(keys, features_of))

    def _prefix(self, embeds_BNE: Floats, questions: Sequence[Sequence[int] | None]) -> Floats:
        feeds: dict[str, npt.NDArray[Any]] = {"image_embeds": embeds_BNE}
        if self._question_conditioned:
            feeds["question_ids"], feeds["question_mask"] = pad_questions(questions)
        assert self._qformer is not None
        prefix_BQD: Floats = self._qformer.run(feeds)["prefix"]
        return prefix_BQD


def open_encoder(manifest: Manifest, engine: Callable[[str], Engine], cache: Cache) -> ImageEncoder:
    """The encoder of a bundle; `engine` gives the engine of a named graph, and is asked for no more than are needed."""
    fused = engine(FUSED) if FUSED in manifest.graphs else None
    if fused is not None and not manifest.model.question_conditioned:
        return ImageEncoder(None, None, cache, manifest, fused)  # one prefix per image, and this graph makes it
    return ImageEncoder(engine("vision"), engine("qformer"), cache, manifest, fused)


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
