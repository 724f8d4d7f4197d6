"""The slow path judges the fast one: every graph and every greedy answer against eager PyTorch, on real images.

The runtime's own encoder and decoder drive a `Judge` per graph (export/judge.py): batches, padding, questions beside
none, prefill and steps. Then the finished bundle answers as a user would ask, and its tokens are
compared with transformers' own `generate`.

Shape letters: B batch, C H W pixels, Q queries, D language width
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from export.calibration import question_ids
from export.config import ExportConfig
from export.eager import Eager
from export.facts import precision_of
from export.graphs import Graph
from export.judge import JUDGING, Judge, Parity, settle
from runtime.answers import Answerer, Request
from runtime.backends import Engine
from runtime.bundle import Bundle
from runtime.errors import CheckFailed
from runtime.image_encoder import FUSED, Floats, ImageEncoder
from runtime.pipeline import TOKENIZER, Pipeline, one_size_batches
from runtime.preprocess import preprocess_batch
from runtime.progress import Progress
from runtime.query_cache import QueryCache
from runtime.reference import ChainCase, GraphCase
from runtime.speaker import open_decoder
from runtime.stopwatch import Stopwatch
from runtime.tokenizer import TextTokenizer
from trainer.blip2 import Blip2
from trainer.generate import EagerPipeline

IMAGE_GRAPHS = ("vision", "qformer", FUSED)
"""What an image passes before the language model."""


@dataclass(frozen=True)
class Verdict:
    """A bundle that passed."""

    parities: tuple[Parity, ...]
    images: int
    captions: int
    questions: int
    equal_answers: int
    """Of all captions and questions: token for token as eager."""
    allowed_differing: float
    cases: tuple[GraphCase, ...]
    """For reference.npz."""
    chain: ChainCase

    def as_json(self) -> dict[str, Any]:
        """What parity.json says."""
        rows = self.captions + self.questions
        return {
            "graphs": [asdict(parity) for parity in self.parities],
            "greedy_answers": {
                "images": self.images,
                "captions": self.captions,
                "questions": self.questions,
                "equal": self.equal_answers,
                "share_equal": self.equal_answers / rows,
                "allowed_share_differing": self.allowed_differing,
            },
        }


@dataclass(frozen=True)
class Judged:
    """Graphs that passed."""

    parities: tuple[Parity, ...]
    cases: tuple[GraphCase, ...]


def verify(
    bundle: Bundle,
    model: Blip2,
    graphs: Mapping[str, Graph],
    requests: Sequence[Request],
    config: ExportConfig,
    progress: Progress,
) -> Verdict:
    """Compare every graph and every answer on `requests`; the first `reference_items` of them are recorded.

    Raises:
        CheckFailed: NaN or infinity anywhere, or a missed tolerance; names the graph and its worst output.
    """
    judged = judge_graphs(bundle, model, graphs, requests, config, progress)
    allowed = max(config.tolerance(precision_of(bundle.manifest, name)).differing_answers for name in graphs)
    batches = _batches(requests, config.reference_items, config.max_batch)
    expected, equal = _compare_answers(bundle, model, batches, allowed, progress)
    prompts, questions = request_tokens(bundle, model, batches[0])
    return Verdict(
        parities=judged.parities,
        images=len({request.image for request in requests}),
        captions=sum(request.question is None for request in requests),
        questions=sum(request.question is not None for request in requests),
        equal_answers=equal,
        allowed_differing=allowed,
        cases=judged.cases,
        chain=ChainCase(
            pixels_BCHW=preprocess_batch([request.image for request in batches[0]], model.preprocess),
            prompts=tuple(prompts),
            questions=tuple(questions),
            token_ids=tuple(expected[: len(batches[0])]),
            max_new_tokens=model.config.max_new_tokens,
            tolerance=allowed,
        ),
    )


def judge_graphs(
    bundle: Bundle,
    model: Blip2,
    graphs: Mapping[str, Graph],
    requests: Sequence[Request],
    config: ExportConfig,
    progress: Progress,
    unjudged: frozenset[str] = frozenset(),
) -> Judged:
    """Compare every graph with its module while the requests are answered; raises as `verify` does.

    Requests ask for one image size after the other (`at_every_size`). All images are encoded before the first answer,
    so that of a large model one part at a time is in memory.

    PyTorch stands for the `unjudged` graphs: those whose file is not in the manifest's precision yet.
    """
    manifest, batches = bundle.manifest, _batches(requests, config.reference_items, config.max_batch)
    by_part = [{n: g for n, g in graphs.items() if (n in IMAGE_GRAPHS) == of_image} for of_image in (True, False)]
    judges, prefixes = list[Judge](), list[Floats]()
    with progress.bar("verifying graphs", 2 * len(batches)) as bar:
        with _opened(bundle, by_part[0], config, unjudged, judges) as engines:
            encoder = ImageEncoder(engines["vision"], engines["qformer"], QueryCache(0), manifest)
            for batch in batches:
                settings = model.preprocess.at(batch[0].image_size)
                pixels_BCHW = preprocess_batch([request.image for request in batch], settings)
                _, questions = request_tokens(bundle, model, batch)
                prefixes.append(encoder.encode(pixels_BCHW, questions, Stopwatch()))
                if FUSED in engines:
                    engines[FUSED].run({"pixels": pixels_BCHW})
                settle(judges)
                bar.advance()
        with _opened(bundle, by_part[1], config, unjudged, judges) as engines:
            decoder = open_decoder(manifest, engines.__getitem__)
            for batch, prefix_BQD in zip(batches, prefixes, strict=True):
                prompts, _ = request_tokens(bundle, model, batch)
                decoder.generate(prefix_BQD, prompts, manifest.generation.max_new_tokens, Stopwatch())
                settle(judges)
                bar.advance()
    parities = tuple(parity for judge in judges for parity in judge.parities.values())
    require_parity(parities)
    return Judged(parities, tuple(case for judge in judges for case in judge.cases.values()))


@contextmanager
def _opened(
    bundle: Bundle, graphs: Mapping[str, Graph], config: ExportConfig, unjudged: frozenset[str], judges: list[Judge]
) -> Iterator[Mapping[str, Engine]]:
    """The graphs of one part of the model, open together; their judges are added to `judges`."""
    with ExitStack() as opened:
        engines: dict[str, Engine] = {name: Eager(graph) for name, graph in graphs.items()}
        for name in (name for name in graphs if name not in unjudged):
            precision = precision_of(bundle.manifest, name)
            outputs = bundle.manifest.graphs[name].outputs
            judge = Judge(graphs[name], JUDGING.open(bundle, name), outputs, precision, config.tolerance(precision))
            engines[name] = opened.enter_context(judge)
            judges.append(judge)
        yield engines


def require_parity(parities: Sequence[Parity]) -> None:
    """CheckFailed naming the worst output when one misses its tolerance."""
    missed = sorted((p for p in parities if not p.ok), key=lambda p: p.max_error / max(p.allowed_error, 1e-12))
    if missed:
        worst = missed[-1]
        raise CheckFailed(
            f"graph '{worst.graph}' ({worst.precision}, {worst.case}): '{worst.output}' is the worst of {len(missed)} "
            f"outputs too far from eager PyTorch: error {worst.max_error:.2g} ({worst.allowed_error:.2g} allowed), "
            f"cosine {worst.cosine:.6f} ({worst.allowed_cosine:g} needed); nothing was written"
        )


def _compare_answers(
    bundle: Bundle, model: Blip2, batches: Sequence[Sequence[Request]], allowed: float, progress: Progress
) -> tuple[list[tuple[int, ...]], int]:
    """Eager's token ids of every request, and how many the finished bundle answers with the same."""

    def answered(answerer: Answerer) -> list[tuple[int, ...]]:
        tokens = list[tuple[int, ...]]()
        for batch in batches:
            tokens += [answer.token_ids for answer in answerer.answer(batch)]
            bar.advance()
        return tokens

    with progress.bar("verifying answers", 2 * len(batches)) as bar:
        expected = answered(EagerPipeline(model))  # before the bundle is opened: a large model has no room beside it
        with Pipeline(bundle, device=JUDGING, cache_bytes=0) as pipeline:
            found = answered(pipeline)
    different = [row for row, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1]]
    if len(different) > allowed * len(expected):
        request = [request for batch in batches for request in batch][different[0]]
        raise CheckFailed(
            f"{len(different)} of {len(expected)} greedy answers differ from eager PyTorch ({allowed:.0%} may), the "
            f"first for {request.image_name}, question {request.question!r}: expected tokens "
            f"{list(expected[different[0]])}, found {list(found[different[0]])}; nothing was written"
        )
    return expected, len(expected) - len(different)


def request_tokens(
    bundle: Bundle, model: Blip2, batch: Sequence[Request]
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...] | None]]:
    """Prompt ids and Q-Former question ids of a batch as the trainer makes them; the bundle's tokenizer must agree."""
    own, prompts = TextTokenizer(bundle.file(TOKENIZER)), list[tuple[int, ...]]()
    for request in batch:
        text = request.filled_prompt(caption=model.config.caption_prompt, vqa=model.config.vqa_prompt)
        ids = list(model.tokenizer(text).input_ids)
        if (found := own.encode(text)) != ids:
            raise CheckFailed(f"{TOKENIZER} reads {text!r} as {found}, transformers as {ids}; nothing was written")
        prompts.append(tuple(ids))
    return prompts, [question_ids(model, request) for request in batch]


def _batches(requests: Sequence[Request], first: int, largest: int) -> list[Sequence[Request]]:
    """The recorded requests, then the rest in batches as large as the bundle takes, each of one image size."""
    rest = requests[first:]
    rows = one_size_batches([request.image_size for request in rest], largest)
    return [requests[:first], *([rest[row] for row in batch] for batch in rows)]


def at_every_size(requests: Sequence[Request], config: ExportConfig) -> Sequence[Request]:
    """The requests, then one batch of them at each other image size."""
    others = [
        replace(request, image_size=side) for side in config.image_sizes for request in requests[: config.max_batch]
    ]
    return [*requests, *others]
