"""Held-out retrieval with re-ranking, spread over the processes that train.

Each process embeds its share of the images and texts and keeps the embeddings of its own images, in half precision and
on disk; ITC features and scores are told to all, embeddings to nobody: the candidate pairs of an image are matched
where its embeddings lie. (LAVIS has every process hold every image: 19 GB each for COCO's 5,000.)

Shape letters: I images, S texts, Q queries, F contrastive width
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.dataset import Row
from runtime.index import EMBEDS, FEATURES, Dtype, Embedded, embed_to, mapped
from runtime.progress import Progress
from runtime.recall import Captioned, candidate_pairs, captioned, recalls, rematched
from runtime.retrieval import Floats
from runtime.search import itc_scores
from trainer.blip2 import Blip2
from trainer.ranks import Ranks
from trainer.retrieval import EagerRetrieval

STORED: Dtype = "float16"


def reranked_recall(
    model: Blip2, rows: Sequence[Row], *, candidates: int, ranks: Ranks, progress: Progress
) -> dict[str, float]:
    """Recall of `runtime.recall`, by ITC and re-ranked; every process calls this and gets the same.

    Images that cannot be read are left out, with their captions.

    Raises:
        DataError: no row has captions, or a process can read none of its images.
    """
    retriever, data = EagerRetrieval(model), captioned(rows)
    with tempfile.TemporaryDirectory(prefix="qforge-") as name:
        folder, first = Path(name), _share(len(data.images), ranks).start
        own = [data.images[image] for image in _share(len(data.images), ranks)]
        made = embed_to(folder, retriever, own, STORED, keep_embeds=True, progress=progress) if own else None
        broken = {} if made is None else made.broken
        known = [first + place for place, path in enumerate(own) if str(path) not in broken]
        told = ranks.collect((known, _stored_features(folder, made)))
        data = _restricted(data, [image for places, _ in told for image in places])
        features_IQF = np.concatenate([features for _, features in told if features is not None])
        texts = [data.texts[text] for text in _share(len(data.texts), ranks)]
        text_SF = np.concatenate(ranks.collect(_text_features(retriever, texts, features_IQF.shape[2])))
        scores_IS = itc_scores(features_IQF, text_SF)
        begin = sum(len(places) for places, _ in told[: ranks.index])
        mine = range(begin, begin + len(known))
        pairs = candidate_pairs(scores_IS, candidates)
        pairs = pairs[(pairs[:, 0] >= mine.start) & (pairs[:, 0] < mine.stop)]
        final_IS = scores_IS[begin : mine.stop]
        if made is not None and made.embeds is not None:
            embeds = mapped(folder / EMBEDS, STORED, (len(known), *made.embeds.shape))

            def embeds_of(image: int) -> Floats:
                return np.asarray(embeds[image - begin], np.float32)

            final_IS = rematched(retriever, embeds_of, scores_IS, pairs, data.texts, progress)[begin : mine.stop]
        return recalls(data, scores_IS, np.concatenate(ranks.collect(final_IS)), candidates).metrics


def _share(count: int, ranks: Ranks) -> range:
    """Consecutive places of this process."""
    return range(ranks.index * count // ranks.count, (ranks.index + 1) * count // ranks.count)


def _stored_features(folder: Path, made: Embedded | None) -> np.ndarray | None:
    if made is None:
        return None
    return np.array(mapped(folder / FEATURES, STORED, (len(made.images), *made.features.shape)))


def _text_features(retriever: EagerRetrieval, texts: Sequence[str], width: int) -> Floats:
    size = retriever.max_batch
    parts = [retriever.embed_texts(texts[start : start + size]) for start in range(0, len(texts), size)]
    return np.concatenate([np.empty((0, width), np.float32), *parts])


def _restricted(data: Captioned, images: Sequence[int]) -> Captioned:
    """The data set of these images alone, and of the captions that belong to one of them."""
    right_IS = data.right_IS[list(images)]
    texts = np.flatnonzero(right_IS.any(axis=0))
    return Captioned([data.images[image] for image in images], [data.texts[text] for text in texts], right_IS[:, texts])
