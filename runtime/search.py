"""Ranking: ITC finds the candidates, ITM looks at each of them together with the query (BLIP-2; LAVIS, k = 128).

ITC score     largest cosine over the image's queries; no temperature, it changes no order
ITM logit     "match" of the matching head, mean over the queries
final score   ITM logit + ITC score of the candidates, as LAVIS ranks (reference/training.md §1.13)

Shape letters: I images, S texts, Q queries, F contrastive width, K candidates, N image tokens, E image width
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.errors import CheckFailed, InputError
from runtime.retrieval import Floats, Retriever

CANDIDATES = 128
"""How many of the ITC ranking are looked at again, as published."""
PIECE_BYTES = 32 * 2**20
"""Memory for one piece of stored features while they are compared."""

Rows = npt.NDArray[np.int64]
ImageOf = Callable[[int], Floats]
"""Image number → its embeddings [N, E]."""


@dataclass(frozen=True)
class Hit:
    """One found image or text."""

    row: int
    """Its place in what was searched."""
    score: float
    """What it is ranked by: ITM logit + ITC score, or the ITC score alone without re-ranking."""
    itc: float
    """Cosine, -1 to 1."""
    match_logit: float | None
    """None without re-ranking."""
    match_probability: float | None
    """Softmax of the two ITM logits, 0 to 1; None without re-ranking."""


def itc_scores(features_IQF: npt.NDArray[Any], texts_SF: Floats) -> Floats:
    """Cosine [I, S] of every image with every text: the best of the image's queries.

    `features_IQF` may be half precision and lie on disk: it is read in pieces.
    """
    images, queries, width = features_IQF.shape
    piece = max(1, PIECE_BYTES // (4 * queries * max(width, len(texts_SF))))
    scores_IS = np.empty((images, len(texts_SF)), np.float32)
    for start in range(0, images, piece):
        part_IQF = np.asarray(features_IQF[start : start + piece], np.float32)
        scores_IS[start : start + piece] = (
            (part_IQF.reshape(-1, width) @ texts_SF.T).reshape(len(part_IQF), queries, -1).max(axis=1)
        )
    return scores_IS


def best_rows(scores: Floats, count: int) -> Rows:
    """Places of the `count` largest scores, best first; equal ones in their own order.

    Raises:
        CheckFailed: a score is not a number.
    """
    if np.isnan(scores).any():
        raise CheckFailed("retrieval: expected numbers as scores, found NaN; check the bundle here: qforge verify")
    count = min(count, len(scores))
    last = np.partition(-scores, count - 1)[count - 1]  # sorting all of a large index would take longer than the rest
    rows = np.flatnonzero(-scores <= last)
    best: Rows = rows[np.argsort(-scores[rows], kind="stable")[:count]]
    return best


def match_pairs(retriever: Retriever, image_of: ImageOf, pairs: Sequence[tuple[int, str]]) -> Floats:
    """ITM logits [pairs, 2] of (image number, text); embeddings are fetched batch by batch."""
    parts = []
    for start in range(0, len(pairs), retriever.max_batch):
        batch = pairs[start : start + retriever.max_batch]
        embeds_BNE = np.stack([image_of(image) for image, _ in batch])
        parts.append(retriever.match(embeds_BNE, [text for _, text in batch]))
    logits_P2 = np.concatenate(parts)
    if not np.isfinite(logits_P2).all():
        raise CheckFailed("graph 'itm': expected numbers, found NaN; check the bundle here: qforge verify")
    return logits_P2


def ranked(rows: Rows, itc: Floats, logits_K2: Floats | None, top: int) -> list[Hit]:
    """The best `top` of the candidates `rows`, whose ITC scores are `itc` and whose ITM logits are `logits_K2`."""
    if logits_K2 is None:
        pairs = zip(rows.tolist()[:top], itc.tolist(), strict=False)
        return [Hit(row, score, score, None, None) for row, score in pairs]
    final = logits_K2[:, 1] + itc
    probability = 1 / (1 + np.exp((logits_K2[:, 0] - logits_K2[:, 1]).astype(np.float64)))
    order = np.argsort(-final, kind="stable")[:top]
    return [
        Hit(int(rows[i]), float(final[i]), float(itc[i]), float(logits_K2[i, 1]), float(probability[i])) for i in order
    ]


def check_counts(top: int, candidates: int) -> None:
    """InputError when so many results cannot be given."""
    if top < 1:
        raise InputError(f"top: expected at least 1, found {top}")
    if candidates < 0 or 0 < candidates < top:
        raise InputError(
            f"candidates: expected 0 (no re-ranking) or at least as many as results ({top}), found {candidates}"
        )


def search_images(
    retriever: Retriever,
    features_IQF: npt.NDArray[Any],
    image_of: ImageOf,
    texts: Sequence[str],
    *,
    top: int,
    candidates: int,
) -> list[list[Hit]]:
    """For every text its `top` images; `candidates` of them are re-ranked by ITM, 0 ranks by ITC alone.

    Raises:
        InputError: fewer than one result, fewer candidates than results, no text or one without words.
    """
    check_counts(top, candidates)
    scores_IS = itc_scores(features_IQF, retriever.embed_texts(texts))
    found = []
    for text, scores in zip(texts, scores_IS.T, strict=True):
        rows = best_rows(scores, candidates or top)
        logits = match_pairs(retriever, image_of, [(int(row), text) for row in rows]) if candidates else None
        found.append(ranked(rows, scores[rows], logits, top))
    return found


def search_texts(
    retriever: Retriever,
    features_SF: npt.NDArray[Any],
    texts: Sequence[str],
    queries_IQF: Floats,
    image_of: ImageOf,
    *,
    top: int,
    candidates: int,
) -> list[list[Hit]]:
    """For every query image its `top` texts, as `search_images` the other way round."""
    check_counts(top, candidates)
    images, queries, width = queries_IQF.shape
    piece = max(1, PIECE_BYTES // (4 * max(width, images * queries)))
    pieces = (features_SF[start : start + piece] for start in range(0, len(features_SF), piece))
    scores_IS = np.concatenate([itc_scores(queries_IQF, np.asarray(part, np.float32)) for part in pieces], axis=1)
    found = []
    for image, scores in enumerate(scores_IS):
        rows = best_rows(scores, candidates or top)
        logits = match_pairs(retriever, image_of, [(image, texts[row]) for row in rows]) if candidates else None
        found.append(ranked(rows, scores[rows], logits, top))
    return found
