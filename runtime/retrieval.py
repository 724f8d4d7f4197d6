"""A bundle that searches: images and texts → features to compare, and the match of an image with a text.

    with runtime.load_retrieval("bundle-retrieval") as retrieval:
        images = retrieval.embed_images(["a.jpg", "b.jpg"])
        scores_IT = itc_scores(images.features_BQF, retrieval.embed_texts(["a red circle"]))

`runtime.index` keeps the features of many images, `runtime.search` ranks them.

Shape letters: B rows, C H W pixels, N image tokens, E image width, Q queries, T text tokens, F contrastive width
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from runtime.backends import CPU, Arrays, Engine, Opener
from runtime.bundle import Bundle
from runtime.closing import Closing
from runtime.errors import InputError
from runtime.held_weights import HeldWeights
from runtime.image_encoder import pad_questions
from runtime.image_memory import IMAGE_EMBEDS, IMAGE_FEATURES, ImageMemory, Rows
from runtime.preprocess import ImageSource, preprocess_batch
from runtime.query_cache import Cache
from runtime.text import normalise_caption
from runtime.tokenizer import TextTokenizer, cut

Floats = npt.NDArray[np.float32]

GRAPHS = ("vision", "itc_image", "itc_text", "itm")
"""What a bundle needs to search."""
RETRIEVAL_TOKENIZER = "qformer_tokenizer.json"
"""The Q-Former's tokenizer; the same file reads questions where they condition the Q-Former."""


@dataclass(frozen=True)
class ImageEmbeddings:
    """What is kept of images."""

    features_BQF: Floats
    """Unit-length features for ITC."""
    image_embeds_BNE: Floats
    """Vision features for ITM."""


class Retriever(Protocol):
    """Anything that scores images and texts; a bundle (`Retrieval`) or eager PyTorch (`trainer.retrieval`)."""

    max_batch: int
    """Rows that are computed together; more are split."""

    def embed_images(self, images: Sequence[ImageSource]) -> ImageEmbeddings:
        """Features [B, Q, F] for ITC and embeddings [B, N, E] for ITM."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        """Features [B, F] for ITC."""
        ...

    def match(self, image_embeds_BNE: Floats, texts: Sequence[str]) -> Floats:
        """ITM logits [B, 2] (no match, match) of image b with text b."""
        ...


def caption_words(text: str) -> str:
    """The text as the Q-Former was trained on captions; InputError when no word is left."""
    words = normalise_caption(text)
    if not words:
        raise InputError(f"text: expected words to search with, found {text!r}")
    return words


class Retrieval(Closing):
    """A bundle with retrieval graphs, open and ready. Safe to share between threads."""

    def __init__(self, bundle: Bundle, *, device: Opener = CPU, cache: Cache | None = None) -> None:
        """Open the graphs on `device`; the errors are those of `runtime.load_retrieval`.

        With a `cache`, an image that is in it costs no vision.
        """
        require_retrieval(bundle)
        with ExitStack() as opened:
            vision, itc_image, itc_text, itm = (opened.enter_context(device.open(bundle, name)) for name in GRAPHS)
            self._graphs = RetrievalGraphs(vision, itc_image, itc_text, itm)
            self._weights = opened.enter_context(HeldWeights(bundle))
            self._engines = opened.pop_all()
        self.bundle = bundle
        self.cache = cache
        """Counters: `cache.statistics()`."""
        self._memory = None if cache is None else ImageMemory(cache, bundle.manifest)
        self.max_batch = bundle.manifest.limits.max_batch
        self._tokenizer = TextTokenizer(bundle.file(RETRIEVAL_TOKENIZER))

    def embed_images(self, images: Sequence[ImageSource]) -> ImageEmbeddings:
        """Features [B, Q, F] for ITC and embeddings [B, N, E] for ITM; ImageError when one cannot be read."""
        parts = [self.embed_pixels(pixels_BCHW) for pixels_BCHW in self._batches(images)]
        return ImageEmbeddings(
            np.concatenate([part.features_BQF for part in parts]),
            np.concatenate([part.image_embeds_BNE for part in parts]),
        )

    def image_features(self, images: Sequence[ImageSource]) -> Floats:
        """The features [B, Q, F] of `embed_images` alone, for which a cache needs no embeddings."""

        def features(pixels_BCHW: Floats) -> Floats:
            self._weights.check()
            return self._features(pixels_BCHW, lambda rows: self._embeds(pixels_BCHW[list(rows)]))

        return np.concatenate([features(pixels_BCHW) for pixels_BCHW in self._batches(images)])

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        """Features [B, F] for ITC; InputError for a text without words."""
        return self.embed_ids(self.token_ids(texts))

    def match(self, image_embeds_BNE: Floats, texts: Sequence[str]) -> Floats:
        """ITM logits [B, 2] (no match, match) of image b with text b."""
        return self.match_ids(image_embeds_BNE, self.token_ids(texts))

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Q-Former ids of each text; a long one is cut and keeps its end token, as in training."""
        if not texts:
            raise InputError("expected at least one text, found an empty list")
        limit = self.bundle.manifest.limits.max_text_tokens
        return [cut(self._tokenizer.encode(caption_words(text)), limit) for text in texts]

    def embed_pixels(self, pixels_BCHW: Floats) -> ImageEmbeddings:
        """`embed_images` of one batch that is preprocessed already; what serving and replay share."""
        self._weights.check()
        embeds_BNE = self._embeds(pixels_BCHW)
        return ImageEmbeddings(self._features(pixels_BCHW, lambda rows: embeds_BNE[list(rows)]), embeds_BNE)

    def remember(self, pixels_BCHW: Floats) -> int:
        """Put features and embeddings of these images into the cache, of which there is one; how many were new."""
        assert self._memory is not None, "opened without a cache"
        memory = self._memory
        keys = [[memory.key(kind, pixels) for kind in (IMAGE_EMBEDS, IMAGE_FEATURES)] for pixels in pixels_BCHW]
        new = len({of_image[0] for of_image in keys if not all(key in memory for key in of_image)})
        self.embed_pixels(pixels_BCHW)
        return new

    def embed_ids(self, ids: Sequence[Sequence[int]]) -> Floats:
        """`embed_texts` of texts that are tokens already."""
        self._weights.check()
        return self._in_batches(len(ids), lambda rows: self._graphs.embed_ids(ids[rows]))

    def match_ids(self, image_embeds_BNE: Floats, ids: Sequence[Sequence[int]]) -> Floats:
        """`match` with texts that are tokens already."""
        self._weights.check()
        if len(image_embeds_BNE) != len(ids):
            raise InputError(f"match: expected one text per image, found {len(image_embeds_BNE)} and {len(ids)}")
        return self._in_batches(len(ids), lambda rows: self._graphs.match_ids(image_embeds_BNE[rows], ids[rows]))

    def close(self) -> None:
        """Free the graphs."""
        self._engines.close()

    def _batches(self, images: Sequence[ImageSource]) -> Iterator[Floats]:
        """pixels_BCHW of so many images as run together; InputError for none."""
        if not images:
            raise InputError("expected at least one image, found an empty list")
        settings = self.bundle.manifest.preprocess
        for start in range(0, len(images), self.max_batch):
            yield preprocess_batch(images[start : start + self.max_batch], settings)

    def _features(self, pixels_BCHW: Floats, embeds_of: Callable[[Rows], Floats]) -> Floats:
        """Features [B, Q, F]; `embeds_of` is asked for the embeddings of rows whose features are not remembered."""
        if self._memory is None:
            return self._graphs.contrast(embeds_of(range(len(pixels_BCHW))))
        keys = [self._memory.key(IMAGE_FEATURES, pixels) for pixels in pixels_BCHW]
        return np.stack(self._memory.remembered(keys, lambda rows: self._graphs.contrast(embeds_of(rows))))

    def _embeds(self, pixels_BCHW: Floats) -> Floats:
        """Embeddings [B, N, E], from the cache where it has them."""
        if self._memory is None:
            return self._graphs.look(pixels_BCHW)
        keys = [self._memory.key(IMAGE_EMBEDS, pixels) for pixels in pixels_BCHW]
        return np.stack(self._memory.remembered(keys, lambda rows: self._graphs.look(pixels_BCHW[list(rows)])))

    def _in_batches(self, count: int, compute: Callable[[slice], Floats]) -> Floats:
        starts = range(0, count, self.max_batch)
        return np.concatenate([compute(slice(start, start + self.max_batch)) for start in starts])


class RetrievalGraphs:
    """The four graphs as functions of one batch; the exporter's judges drive it as serving does."""

    def __init__(self, vision: Engine, itc_image: Engine, itc_text: Engine, itm: Engine) -> None:
        """The engines stay the caller's to close."""
        self._vision, self._itc_image, self._itc_text, self._itm = vision, itc_image, itc_text, itm

    def embed_pixels(self, pixels_BCHW: Floats) -> ImageEmbeddings:
        """Features [B, Q, F] and embeddings [B, N, E]."""
        embeds_BNE = self.look(pixels_BCHW)
        return ImageEmbeddings(self.contrast(embeds_BNE), embeds_BNE)

    def look(self, pixels_BCHW: Floats) -> Floats:
        """Embeddings [B, N, E]."""
        embeds_BNE: Floats = self._vision.run({"pixels": pixels_BCHW})["image_embeds"]
        return embeds_BNE

    def contrast(self, image_embeds_BNE: Floats) -> Floats:
        """Features [B, Q, F]."""
        features_BQF: Floats = self._itc_image.run({"image_embeds": image_embeds_BNE})["image_features"]
        return features_BQF

    def embed_ids(self, ids: Sequence[Sequence[int]]) -> Floats:
        """Features [B, F]."""
        ids_BT, mask_BT = pad_questions(ids)
        features_BF: Floats = self._itc_text.run({"text_ids": ids_BT, "text_mask": mask_BT})["text_feature"]
        return features_BF

    def match_ids(self, image_embeds_BNE: Floats, ids: Sequence[Sequence[int]]) -> Floats:
        """Logits [B, 2]."""
        ids_BT, mask_BT = pad_questions(ids)
        feeds: Arrays = {
            "image_embeds": np.ascontiguousarray(image_embeds_BNE),
            "text_ids": ids_BT,
            "text_mask": mask_BT,
        }
        logits_B2: Floats = self._itm.run(feeds)["match_logits"]
        return logits_B2


def require_retrieval(bundle: Bundle) -> None:
    """InputError when a bundle has no graphs to search with."""
    if any(name not in bundle.manifest.graphs for name in GRAPHS):
        raise InputError(
            f"{bundle.path}: this bundle answers and cannot search: expected the graphs {', '.join(GRAPHS[1:])}, found "
            f"{', '.join(bundle.manifest.graphs)}; export one from a stage-1 checkpoint: "
            f"qforge export CKPT --heads retrieval"
        )
