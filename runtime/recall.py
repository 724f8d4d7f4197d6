"""One scorer of retrieval for eager PyTorch and for every bundle: recall in both directions, by ITC and re-ranked.

A query counts as found at k when one of its right answers is among the first k. Right answers of an image are its
captions; right answers of a caption are its images: a caption that reads the same for several images is as right for
each of them (as in stage 1's own metric; captions of photographs hardly ever repeat).

Shape letters: I images, S texts, K candidates
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.dataset import Row
from runtime.errors import DataError, ImageError, InputError
from runtime.index import EMBEDS, FEATURES, embed_to, mapped
from runtime.progress import Progress
from runtime.retrieval import Floats, Retriever, caption_words
from runtime.search import ImageOf, Rows, best_rows, itc_scores, match_pairs

AT = (1, 5, 10)
"""Ranks recall is given for."""
Pairs = np.ndarray[Any, np.dtype[np.int64]]
BATCHES_A_STEP = 8
"""Batches of pairs between two steps of the bar."""


@dataclass(frozen=True)
class Captioned:
    """Images and captions, and which belong together."""

    images: list[Path]
    texts: list[str]
    right_IS: np.ndarray[Any, np.dtype[np.bool_]]
    """True where a text belongs to an image."""


@dataclass(frozen=True)
class RetrievalEvaluation:
    """Recall of one retriever on one data set."""

    metrics: dict[str, float]
    """itc_ (ITC alone) and itm_ (re-ranked) + text_to_image_ or image_to_text_ + r1, r5, r10: 0 to 1."""
    hits: dict[str, tuple[bool, ...]]
    """The same names → whether each query found a right answer, images or texts in their order."""
    images: int
    texts: int
    candidates: int

    def as_json(self) -> dict[str, Any]:
        """Metrics, n (queries in both directions) and settings, ready for `json.dumps`."""
        settings = {"task": "retrieval", "images": self.images, "texts": self.texts, "candidates": self.candidates}
        return {"metrics": dict(self.metrics), "n": self.images + self.texts, "settings": settings}


def captioned(rows: Sequence[Row]) -> Captioned:
    """The images and captions of caption rows; rows of one image_id are one image.

    Raises:
        DataError: no row has captions.
    """
    images, texts = dict[str, Path](), dict[str, int]()
    pairs = list[tuple[int, int]]()
    numbers = dict[str, int]()
    for row in rows:
        for caption in row.captions:
            images.setdefault(row.image_id, row.image)
            image = numbers.setdefault(row.image_id, len(numbers))
            pairs.append((image, texts.setdefault(caption_words(caption), len(texts))))
    if not pairs:
        raise DataError(f"expected rows with captions, found none among {len(rows)}; choose the other task or file")
    right_IS = np.zeros((len(images), len(texts)), np.bool_)
    right_IS[tuple(np.array(pairs).T)] = True
    return Captioned(list(images.values()), list(texts), right_IS)


def evaluate_retrieval(
    retriever: Retriever, rows: Sequence[Row], *, candidates: int, progress: Progress
) -> RetrievalEvaluation:
    """Recall at 1, 5 and 10; `candidates` of each ITC ranking are re-ranked by ITM, 0 leaves that out.

    Embeddings wait on disk for the re-ranking (a temporary folder), so memory holds the scores alone.

    Raises:
        DataError: no row has captions. ImageError: an image cannot be read. InputError: bad candidates.
    """
    if candidates and candidates < max(AT):
        raise InputError(f"candidates: expected 0 (no re-ranking) or at least {max(AT)}, found {candidates}")
    data = captioned(rows)
    with tempfile.TemporaryDirectory(prefix="qforge-") as name:
        folder = Path(name)
        made = embed_to(folder, retriever, data.images, "float32", keep_embeds=bool(candidates), progress=progress)
        if made.broken:
            raise ImageError(next(iter(made.broken.values())))
        text_SF = _text_features(retriever, data.texts)
        features = mapped(folder / FEATURES, "float32", (len(data.images), *made.features.shape))
        scores_IS, final_IS = itc_scores(features, text_SF), None
        if made.embeds is not None:
            embeds = mapped(folder / EMBEDS, "float32", (len(data.images), *made.embeds.shape))
            pairs = candidate_pairs(scores_IS, candidates)
            final_IS = rematched(retriever, embeds.__getitem__, scores_IS, pairs, data.texts, progress)
    return recalls(data, scores_IS, final_IS, candidates)


def recalls(data: Captioned, scores_IS: Floats, final_IS: Floats | None, candidates: int) -> RetrievalEvaluation:
    """Recall of the ITC scores, and of the final ones where the candidates were re-ranked (see `rematched`)."""
    by_image, by_text = _rankings(scores_IS, candidates)
    hits = _hits("itc", by_image, by_text, data)
    if final_IS is not None:
        by_image = [row[best_rows(final_IS[image, row], max(AT))] for image, row in enumerate(by_image)]
        by_text = [row[best_rows(final_IS[row, text], max(AT))] for text, row in enumerate(by_text)]
        hits |= _hits("itm", by_image, by_text, data)
    metrics = {name: sum(found) / len(found) for name, found in hits.items()}
    return RetrievalEvaluation(metrics, hits, len(data.images), len(data.texts), candidates)


def _rankings(scores_IS: Floats, candidates: int) -> tuple[list[Rows], list[Rows]]:
    """The best texts of every image and the best images of every text, as many as are looked at."""
    count = max(candidates, *AT)
    return [best_rows(scores, count) for scores in scores_IS], [best_rows(scores, count) for scores in scores_IS.T]


def candidate_pairs(scores_IS: Floats, candidates: int) -> Pairs:
    """(image, text) [P, 2] of every pair that is a candidate in either direction, once, image by image."""
    by_image, by_text = _rankings(scores_IS, candidates)
    wanted_IS = np.zeros(scores_IS.shape, np.bool_)
    for image, row in enumerate(by_image):
        wanted_IS[image, row] = True
    for text, row in enumerate(by_text):
        wanted_IS[row, text] = True
    return np.argwhere(wanted_IS)


def _text_features(retriever: Retriever, texts: Sequence[str]) -> Floats:
    size = retriever.max_batch
    return np.concatenate([retriever.embed_texts(texts[start : start + size]) for start in range(0, len(texts), size)])


def rematched(
    retriever: Retriever, image_of: ImageOf, scores_IS: Floats, pairs: Pairs, texts: Sequence[str], progress: Progress
) -> Floats:
    """Scores [I, S] with the ITM logit of each pair added; others stay as they are."""
    final_IS = scores_IS.copy()
    size = retriever.max_batch * BATCHES_A_STEP
    starts = range(0, len(pairs), size)
    with progress.bar("matching pairs", len(starts), items_per_step=size) as bar:
        for start in starts:
            part = pairs[start : start + size]
            logits_P2 = match_pairs(retriever, image_of, [(int(i), texts[s]) for i, s in part])
            final_IS[tuple(part.T)] += logits_P2[:, 1]
            bar.advance()
    return final_IS


def _hits(
    prefix: str, by_image: Sequence[Rows], by_text: Sequence[Rows], data: Captioned
) -> dict[str, tuple[bool, ...]]:
    found = {}
    for direction, rankings, right in (
        ("text_to_image", by_text, data.right_IS.T),
        ("image_to_text", by_image, data.right_IS),
    ):
        for at in AT:
            hits = (bool(right[query, row[:at]].any()) for query, row in enumerate(rankings))
            found[f"{prefix}_{direction}_r{at}"] = tuple(hits)
    return found
