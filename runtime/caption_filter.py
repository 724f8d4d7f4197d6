"""Caption filtering (CapFilt: BLIP, arXiv 2201.12086, section 3.3; as BLIP-2 uses it, arXiv 2301.12597, section 4.1).

Web captions are noisy. A model describes each image several times, and of its captions and the original ones those are
kept that fit the image best, by the image-text similarity of ITC. What is kept is a manifest that trains as it is:

    {"image": "1.png", "image_id": "1", "captions": ["a red circle", "a circle"],
     "caption_scores": [{"score": 0.41, "origin": "synthetic"}, {"score": 0.38, "origin": "original"}]}

BLIP-2 took ten captions an image, ranked by CLIP ViT-L/14, and kept two. The score is here the cosine by which
`qforge search` finds candidates: the best of the image's queries with the text.

Shape letters: B images, Q queries, F contrastive width, S texts
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image

from runtime.answers import Answerer, Request
from runtime.dataset import Row
from runtime.decoding import Decoding
from runtime.errors import CheckFailed, ImageError, InputError
from runtime.preprocess import load_image
from runtime.retrieval import Floats, Retriever
from runtime.search import itc_scores
from runtime.text import is_text, normalise_caption

Origin = Literal["original", "synthetic"]


@dataclass(frozen=True)
class How:
    """How captions are made and kept."""

    captions: int
    """Made for each image."""
    keep: int
    """Kept of each image, at most: the original and the made ones together, each text once."""
    top_p: float
    """Words are drawn among the likeliest of this total probability."""
    temperature: float
    """Below 1 sharpens the odds, above 1 flattens them."""
    seed: int
    """The same seed draws the same captions."""
    max_new_tokens: int | None
    """Longest caption (tokens); None: the model's own limit."""
    at_once: int
    """Captions of an image that are drawn together, at most: what the generator can."""

    def __post_init__(self) -> None:
        """InputError for what cannot be drawn or kept."""
        for name in ("captions", "keep", "at_once"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected at least 1, found {getattr(self, name)}")
        list(self.decodings())

    def decodings(self) -> Iterator[Decoding]:
        """The same for who generates, round by round."""
        for number, first in enumerate(range(0, self.captions, self.at_once)):
            yield Decoding(
                do_sample=True,
                top_p=self.top_p,
                temperature=self.temperature,
                seed=int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0]) if number else self.seed,
                num_return_sequences=min(self.at_once, self.captions - first),
            )


@dataclass(frozen=True)
class Scored:
    """A caption of an image."""

    text: str
    score: float
    """Cosine of image and text, -1 to 1."""
    origin: Origin


@dataclass
class Counts:
    """What became of the captions of many images."""

    images: int = 0
    original: int = 0
    """Captions that were there, each text once."""
    synthetic: int = 0
    """Captions that were made and are another text than those."""
    kept_original: int = 0
    kept_synthetic: int = 0
    before: float = 0.0
    """Sum of the scores of the original captions."""
    after: float = 0.0
    """Sum of the scores of the kept ones."""

    def add(self, ranked: Sequence[Scored], keep: int) -> None:
        """Count one image, all its captions being ranked."""
        self.images += 1
        found, kept = (Counter(caption.origin for caption in some) for some in (ranked, ranked[:keep]))
        self.original, self.synthetic = self.original + found["original"], self.synthetic + found["synthetic"]
        self.kept_original += kept["original"]
        self.kept_synthetic += kept["synthetic"]
        self.before += sum(caption.score for caption in ranked if caption.origin == "original")
        self.after += sum(caption.score for caption in ranked[:keep])


@dataclass
class Filtered:
    """What became of some rows."""

    rows: list[tuple[Row, list[Scored]]] = field(default_factory=list)
    """Rows in their order, each with what is kept, best first; with nothing where a row had no captions."""
    broken: dict[str, str] = field(default_factory=dict)
    """Images that cannot be read, whose rows are left out → why."""
    wordless: list[str] = field(default_factory=list)
    """Images of which neither an original nor a made caption is a text with a word; their rows are left out."""
    counts: Counts = field(default_factory=Counts)


def filter_rows(generator: Answerer, scorer: Retriever, rows: Sequence[Row], how: How) -> Filtered:
    """Describe the images of the rows that have captions, rank old and new captions, keep the best.

    Raises:
        InputError: the generator cannot draw, or a bad number in `how`.
        CheckFailed: a score is not a number.
    """
    done, images = Filtered(), dict[int, Image.Image]()
    for place, row in enumerate(rows):
        try:
            if row.captions:
                images[place] = load_image(row.image)
        except ImageError as error:
            done.broken[str(row.image)] = str(error)
    texts = _texts(generator, rows, images, how)
    scores = _scores(scorer, images, {place: list(of_image) for place, of_image in texts.items()})
    for place, row in enumerate(rows):
        if not row.captions:
            done.rows.append((row, []))
        elif place in images and not texts[place]:
            done.wordless.append(str(row.image))
        elif place in images:
            ranked = rank(texts[place], scores[place])
            done.counts.add(ranked, how.keep)
            done.rows.append((row, ranked[: how.keep]))
    return done


def rank(texts: dict[str, Origin], scores: Sequence[float]) -> list[Scored]:
    """Captions of one image, best first; of equal ones the original, then the earlier."""
    found = [Scored(text, score, origin) for (text, origin), score in zip(texts.items(), scores, strict=True)]
    return sorted(found, key=lambda caption: (-caption.score, caption.origin != "original"))


def distinct(original: Sequence[str], synthetic: Sequence[str]) -> dict[str, Origin]:
    """Captions that differ in words, the first of each; those that are no text, or have no word, are left out."""
    found = dict[str, tuple[str, Origin]]()
    sources: tuple[tuple[Sequence[str], Origin], ...] = ((original, "original"), (synthetic, "synthetic"))
    for texts, origin in sources:
        for text in texts:
            if (words := normalise_caption(text)) and is_text(text):
                found.setdefault(words, (text, origin))
    return dict(found.values())


def _texts(
    generator: Answerer, rows: Sequence[Row], images: dict[int, Image.Image], how: How
) -> dict[int, dict[str, Origin]]:
    """Of each image, by the place of its row, its captions and where they are from."""
    if not images:
        return {}
    requests, said = [Request(image) for image in images.values()], {place: list[str]() for place in images}
    for decoding in how.decodings():
        answers = generator.answer(requests, max_new_tokens=how.max_new_tokens, decoding=decoding)
        for place, answer in zip(images, answers, strict=True):
            said[place] += answer.texts
    return {place: distinct(rows[place].captions, said[place]) for place in images}


def _scores(scorer: Retriever, images: dict[int, Image.Image], texts: dict[int, list[str]]) -> dict[int, list[float]]:
    """Cosine of each image with each of its texts."""
    wanted = {place: image for place, image in images.items() if texts[place]}
    many = list(dict.fromkeys(text for place in wanted for text in texts[place]))
    if not many:
        return {}
    size = scorer.max_batch
    pictures = list(wanted.values())
    features_BQF = np.concatenate(
        [scorer.embed_images(pictures[start : start + size]).features_BQF for start in range(0, len(pictures), size)]
    )
    text_SF: Floats = np.concatenate(
        [scorer.embed_texts(many[start : start + size]) for start in range(0, len(many), size)]
    )
    scores_BS = itc_scores(features_BQF, text_SF)
    if np.isnan(scores_BS).any():
        raise CheckFailed("caption filter: expected numbers as scores, found NaN; check the scorer: qforge verify")
    column = {text: number for number, text in enumerate(many)}
    return {
        place: [float(scores_S[column[text]]) for text in texts[place]]
        for place, scores_S in zip(wanted, scores_BS, strict=True)
    }
