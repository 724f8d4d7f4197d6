"""The retrieval graphs judged by eager PyTorch, and the real captions they are calibrated and judged on.

Every image meets its own caption and one that belongs to another image: what a search shows the matching head is
mostly what does not match.

Shape letters: B rows, C H W pixels, N image tokens, E image width, T text tokens
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.config import ExportConfig
from export.eager import Eager
from export.facts import precision_of
from export.feeds import StoredFeeds
from export.graphs import Arrays, Graph
from export.judge import JUDGING, Judge, Parity, settle
from export.verify import require_parity
from runtime.answers import Request
from runtime.bundle import Bundle
from runtime.checks import relative_error
from runtime.errors import CheckFailed, DataError
from runtime.image_encoder import pad_questions
from runtime.preprocess import preprocess, preprocess_batch
from runtime.progress import Progress
from runtime.reference import GraphCase, RetrievalCase
from runtime.retrieval import GRAPHS, RETRIEVAL_TOKENIZER, Floats, Retrieval, RetrievalGraphs, caption_words
from runtime.tokenizer import TextTokenizer, cut
from trainer.blip2 import Blip2, text_batch
from trainer.retrieval import EagerRetrieval
from trainer.sources.convert import rows_of


@dataclass(frozen=True)
class Pair:
    """An image and a text to search it with."""

    image: Path
    text: str


@dataclass(frozen=True)
class RetrievalVerdict:
    """Retrieval graphs that passed."""

    parities: tuple[Parity, ...]
    images: int
    pairs: int
    itc_error: float
    """Largest difference of a cosine from eager's, as a fraction of eager's largest."""
    match_error: float
    """The same of the ITM logits."""
    cases: tuple[GraphCase, ...]
    """For reference.npz."""
    chain: RetrievalCase

    def as_json(self) -> dict[str, Any]:
        """What parity.json says of the scores; the graphs stand with all others."""
        return {
            "images": self.images,
            "pairs": self.pairs,
            "itc_max_error": self.itc_error,
            "itm_max_error": self.match_error,
        }


def draw_pairs(manifests: Sequence[Path], requests: Sequence[Request], seed: int) -> list[Pair]:
    """Each image of the requests with a caption of its own (of any where it has none), then with another image's.

    Raises:
        DataError: fewer than two different captions in the manifests.
    """
    if not requests:
        return []
    captions: dict[str, list[str]] = {}
    for path in manifests:
        for row in rows_of(path):
            captions.setdefault(str(row.image), []).extend(row.captions)
    known = list(dict.fromkeys(text for texts in captions.values() for text in texts))
    if len(known) < 2:
        raise DataError(
            f"{', '.join(map(str, manifests))}: retrieval graphs are checked on real captions, expected at least two, "
            f"found {len(known)}; add a manifest with captions: --calibration FILE"
        )
    rng, pairs = np.random.default_rng([seed, 1]), list[Pair]()
    for image in dict.fromkeys(Path(str(request.image)) for request in requests):
        own = captions.get(str(image), [])
        pairs.append(Pair(image, (own or known)[rng.choice(len(own or known))]))
        drawn = rng.choice(len(known), size=min(8, len(known)), replace=False)  # places: the texts may be millions
        others = [known[place] for place in drawn if known[place] not in own]
        pairs.append(Pair(image, (others or known)[0]))
    return pairs


def retrieval_feeds(
    model: Blip2, graphs: Mapping[str, Graph], pairs: Sequence[Pair], folder: Path
) -> dict[str, StoredFeeds]:
    """What the graphs meet when these pairs are searched, one row a time, by graph; kept in `folder`."""
    feeds = {name: StoredFeeds(folder / name) for name in GRAPHS}
    embeds: dict[Path, Arrays] = {}
    for pair in pairs:
        if pair.image not in embeds:
            pixels = {"pixels": preprocess(pair.image, model.preprocess)[None]}
            feeds["vision"].append(pixels)
            embeds = {pair.image: graphs["vision"].run_eager(pixels)}  # an image's pairs follow each other
            feeds["itc_image"].append(embeds[pair.image])
        ids_BT, mask_BT = pad_questions(_ids(model, [pair.text]))
        text: Arrays = {"text_ids": ids_BT, "text_mask": mask_BT}
        feeds["itc_text"].append(text)
        feeds["itm"].append(embeds[pair.image] | text)
    return feeds


def judge_retrieval(
    bundle: Bundle,
    model: Blip2,
    graphs: Mapping[str, Graph],
    pairs: Sequence[Pair],
    config: ExportConfig,
    progress: Progress,
    unjudged: frozenset[str] = frozenset(),
) -> tuple[tuple[Parity, ...], tuple[GraphCase, ...]]:
    """Compare every graph with its module while the pairs are scored; their distances and the first runs.

    PyTorch stands for the `unjudged` graphs: those whose file is not in the manifest's precision yet.

    Raises:
        CheckFailed: NaN or infinity anywhere, or a missed tolerance; names the graph and its worst output.
    """
    with ExitStack() as opened:
        judges = dict[str, Judge]()
        for name in (name for name in GRAPHS if name not in unjudged):
            precision = precision_of(bundle.manifest, name)
            outputs = bundle.manifest.graphs[name].outputs
            judge = Judge(graphs[name], JUDGING.open(bundle, name), outputs, precision, config.tolerance(precision))
            judges[name] = opened.enter_context(judge)
        chain = RetrievalGraphs(*(judges.get(name) or Eager(graphs[name]) for name in GRAPHS))
        batches = _batches(pairs, config)
        with progress.bar("verifying retrieval", len(batches), items_per_step=config.max_batch) as bar:
            for batch in batches:
                ids = _ids(model, [pair.text for pair in batch])
                pixels_BCHW = preprocess_batch([pair.image for pair in batch], model.preprocess)
                chain.embed_ids(ids)
                chain.match_ids(chain.embed_pixels(pixels_BCHW).image_embeds_BNE, ids)
                settle(judges.values())
                bar.advance()
    parities = tuple(parity for judge in judges.values() for parity in judge.parities.values())
    require_parity(parities)
    return parities, tuple(case for judge in judges.values() for case in judge.cases.values())


def verify_retrieval(
    bundle: Bundle,
    model: Blip2,
    graphs: Mapping[str, Graph],
    pairs: Sequence[Pair],
    config: ExportConfig,
    progress: Progress,
) -> RetrievalVerdict:
    """Graphs, then the scores that a user gets, from image files and texts; raises as `judge_retrieval`."""
    parities, cases = judge_retrieval(bundle, model, graphs, pairs, config, progress)
    _require_same_tokens(bundle, model, pairs)
    allowed = max(config.tolerance(precision_of(bundle.manifest, name)).max_error for name in GRAPHS)
    eager, worst = EagerRetrieval(model), {"itc": 0.0, "itm": 0.0}
    chain: RetrievalCase | None = None
    with Retrieval(bundle, device=JUDGING) as retrieval:
        for batch in _batches(pairs, config):
            expected, found = (_scores(of, batch) for of in (eager, retrieval))
            for name, *sides in zip(worst, found, expected, strict=True):
                worst[name] = max(worst[name], relative_error(*sides))
            chain = chain or RetrievalCase(
                pixels_BCHW=preprocess_batch([pair.image for pair in batch], model.preprocess),
                texts=tuple(map(tuple, _ids(model, [pair.text for pair in batch]))),
                itc_B=expected[0],
                match_logits_B2=expected[1],
                tolerance=allowed,
            )
    score = max(worst, key=lambda name: worst[name])
    if worst[score] > allowed or chain is None:
        raise CheckFailed(
            f"{score} scores of the finished bundle are up to {worst[score]:.2g} from eager PyTorch's "
            f"({allowed:.2g} allowed); nothing was written"
        )
    images = len({pair.image for pair in pairs})
    return RetrievalVerdict(parities, images, len(pairs), worst["itc"], worst["itm"], cases, chain)


def _scores(retriever: EagerRetrieval | Retrieval, pairs: Sequence[Pair]) -> tuple[Floats, Floats]:
    """ITC scores [B] and ITM logits [B, 2]."""
    images, texts = retriever.embed_images([pair.image for pair in pairs]), [pair.text for pair in pairs]
    itc_B = np.einsum("bqf,bf->bq", images.features_BQF, retriever.embed_texts(texts)).max(axis=1)
    return itc_B, retriever.match(images.image_embeds_BNE, texts)


def _ids(model: Blip2, texts: Sequence[str]) -> list[list[int]]:
    """Q-Former ids of each text, as the trainer makes them."""
    return [text_batch(model, [caption_words(text)]).ids[0].tolist() for text in texts]


def _require_same_tokens(bundle: Bundle, model: Blip2, pairs: Sequence[Pair]) -> None:
    own, limit = TextTokenizer(bundle.file(RETRIEVAL_TOKENIZER)), bundle.manifest.limits.max_text_tokens
    texts = list(dict.fromkeys(pair.text for pair in pairs))
    for text, ids in zip(texts, _ids(model, texts), strict=True):
        if (found := cut(own.encode(caption_words(text)), limit)) != ids:
            raise CheckFailed(
                f"{RETRIEVAL_TOKENIZER} reads {text!r} as {found}, transformers as {ids}; nothing was written"
            )


def _batches(pairs: Sequence[Pair], config: ExportConfig) -> list[Sequence[Pair]]:
    """The recorded pairs, then the rest in batches as large as the bundle takes."""
    first = config.reference_items
    starts = range(first, len(pairs), config.max_batch)
    return [pairs[:first], *(pairs[start : start + config.max_batch] for start in starts)]
