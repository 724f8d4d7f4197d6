"""Questions about the wrong image: what is left of the score is what a model gets without looking.

A model that looks falls to the level of the best question-only answerer; one that guesses from the question does not
notice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from runtime.dataset import Row
from runtime.errors import DataError
from runtime.files import sha256_of


def image_hashes(rows: Sequence[Row]) -> dict[Path, str]:
    """SHA-256 of every image file of the rows; MissingFile when one is not there."""
    return {image: sha256_of(image) for image in dict.fromkeys(row.image for row in rows)}


def with_swapped_images(rows: Sequence[Row], hashes: Mapping[Path, str], seed: int) -> list[Row]:
    """Every question with another image, of other content (by `image_hashes`); the seed decides which.

    Raises:
        DataError: all rows show the same image.
    """
    contents = sorted({hashes[row.image] for row in rows})
    if len(contents) < 2:
        raise DataError("expected questions about two different images or more to swap images, found one image")
    file_of = {hashes[row.image]: row.image for row in rows}
    # Contents in random order, each given the next one's image: one cycle, so none keeps its own.
    order = [contents[i] for i in np.random.default_rng(seed).permutation(len(contents))]
    other = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [replace(row, image=file_of[other[hashes[row.image]]]) for row in rows]
