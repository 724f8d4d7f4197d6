"""The story of one batch of requests, from image files to text.

    with runtime.load("runs/demo/bundle-fp32") as pipeline:
        print(pipeline.vqa("photo.jpg", "what colour is the circle?").text)

Shape letters: B images, C colour channels, H height, W width, Q queries, D language width
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from runtime.answers import Alternative, Answer, Request
from runtime.backends import CPU, Engine, Opener
from runtime.bundle import Bundle
from runtime.closing import Closing
from runtime.decoding import GREEDY, Decoding
from runtime.decoding.stop_strings import StopStrings
from runtime.decoding.text_decoder import check_new_tokens
from runtime.disk_cache import DiskCache
from runtime.errors import InputError
from runtime.held_weights import HeldWeights
from runtime.image_encoder import open_encoder
from runtime.preprocess import ImageSource, preprocess_batch, sources_of
from runtime.query_cache import Statistics
from runtime.speaker import open_decoder
from runtime.stopwatch import Stopwatch
from runtime.streaming import Piece, SteadyText
from runtime.text import qformer_text
from runtime.tiered_cache import open_cache
from runtime.tokenizer import TextTokenizer, cut

TOKENIZER = "tokenizer.json"
"""The language model's tokenizer, in every bundle."""

QFORMER_TOKENIZER = "qformer_tokenizer.json"
"""The Q-Former's tokenizer, in bundles whose Q-Former reads a text."""

PROMPT_SHARE = 4
"""One part in so many of the memory for what was seen goes to prompts: a prompt's keys and values are hundreds of times
larger than an image's query vectors, and it is the last few that come again."""


class Pipeline(Closing):
    """A bundle that is open and ready; satisfies `runtime.answers.Answerer`. Safe to share between threads."""

    def __init__(
        self, bundle: Bundle, *, device: Opener = CPU, cache_bytes: int, disk: DiskCache | None = None
    ) -> None:
        """Open every graph it answers with on `device`; `cache_bytes` and the errors are those of `runtime.load`.

        `disk` is the cache behind the one in memory; None for no such tier.
        """
        if bundle.manifest.model.style == "none":
            raise InputError(
                f"{bundle.path}: this bundle searches and cannot answer: it was exported without a language model; "
                f"use qforge index and qforge search, or export a checkpoint that speaks: "
                f"qforge export CKPT --heads generate"
            )
        self.bundle = bundle
        manifest = bundle.manifest
        self._templates = {"caption": manifest.prompts.caption, "vqa": manifest.prompts.vqa}
        prompt_bytes = cache_bytes // PROMPT_SHARE if manifest.model.style == "decoder-only" else 0
        self.cache = open_cache(cache_bytes - prompt_bytes, disk)
        self._tokenizer = TextTokenizer(bundle.file(TOKENIZER))
        self._qformer_tokenizer = (
            TextTokenizer(bundle.file(QFORMER_TOKENIZER)) if manifest.model.question_conditioned else None
        )
        with ExitStack() as opened:

            def engine(name: str) -> Engine:
                return opened.enter_context(device.open(bundle, name))

            self._encoder = open_encoder(manifest, engine, self.cache)
            self._decoder = open_decoder(manifest, engine, prompt_bytes, device.in_place)
            self._weights = opened.enter_context(HeldWeights(bundle))
            self._engines = opened.pop_all()

    def answer(
        self, requests: Sequence[Request], *, max_new_tokens: int | None = None, decoding: Decoding = GREEDY
    ) -> list[Answer]:
        """Answer all requests; more than the bundle's `max_batch` are run in several batches.

        Every answer carries the timings of this whole call.

        Raises:
            ImageError: an image cannot be read.
            InputError: no request, a bad prompt or question, or beyond the bundle's limits.
            BundleError: somebody wrote into the bundle's weights since they were opened.
        """
        self._weights.check()
        watch = Stopwatch()
        manifest = self.bundle.manifest
        if not requests:
            raise InputError("expected at least one request, found none")
        new_tokens = self._new_tokens(max_new_tokens)
        prompts = [self._prompt_ids(request) for request in requests]
        questions = [self._question_ids(request) for request in requests]
        generated: dict[int, list[tuple[int, ...]]] = {}
        sides = [manifest.side(request.image_size) for request in requests]
        many = decoding.num_return_sequences
        for rows in one_size_batches(sides, manifest.limits.max_batch):
            with watch.phase("preprocess"):
                images = [requests[row].image for row in rows]
                pixels_BCHW = preprocess_batch(images, manifest.preprocess.at(sides[rows[0]]))
            asked, told = [questions[row] for row in rows], [prompts[row] for row in rows]
            said = self.generate(pixels_BCHW, asked, told, new_tokens, watch, decoding)
            generated |= {row: said[place * many : (place + 1) * many] for place, row in enumerate(rows)}
        spoken = [self._spoken(generated[row]) for row in range(len(requests))]
        timings_ms = watch.timings_ms()
        return [answer_of(request, texts, timings_ms) for request, texts in zip(requests, spoken, strict=True)]

    def caption(
        self, images: ImageSource | Sequence[ImageSource], prompt: str | None = None, *, decoding: Decoding = GREEDY
    ) -> list[Answer]:
        """Caption one image or several."""
        return self.answer([Request(image, prompt=prompt) for image in sources_of(images)], decoding=decoding)

    def vqa(
        self, image: ImageSource, question: str, prompt: str | None = None, *, decoding: Decoding = GREEDY
    ) -> Answer:
        """Answer a question about an image."""
        return self.answer([Request(image, question, prompt)], decoding=decoding)[0]

    def stream(
        self, request: Request, *, max_new_tokens: int | None = None, decoding: Decoding = GREEDY
    ) -> Iterator[Piece]:
        """One answer while it is said: a piece per token, and a last one that has the whole answer.

            for piece in pipeline.stream(Request("photo.jpg")):
                print(piece.text, end="", flush=True)

        The pieces' texts together are the answer's. The image is read before this returns, so that what is wrong with
        a request is known before the first piece.

        Raises:
            ImageError: the image cannot be read.
            InputError: a bad prompt or question, several sequences or beams, or beyond the bundle's limits.
            BundleError: as `answer`.
        """
        self._weights.check()
        watch, side = Stopwatch(), self.bundle.manifest.side(request.image_size)
        new_tokens = self._new_tokens(max_new_tokens)
        prompt, question = self._prompt_ids(request), self._question_ids(request)
        with watch.phase("preprocess"):
            pixels_BCHW = preprocess_batch([request.image], self.bundle.manifest.preprocess.at(side))
        prefix_BQD = self._encoder.encode(pixels_BCHW, [question], watch)
        tokens = self._decoder.stream(prefix_BQD, prompt, new_tokens, watch, decoding, self._stops(decoding))
        return self._pieces(request, tokens, watch)

    def _pieces(self, request: Request, tokens: Iterator[int], watch: Stopwatch) -> Iterator[Piece]:
        steady, said = SteadyText(self._tokenizer), list[int]()
        for token in tokens:
            said.append(token)
            yield Piece(steady.put(token), (token,))
        rest, text = steady.end()
        answer = Answer(request.image_name, request.question, text, tuple(said), watch.timings_ms())
        yield Piece(rest, (), answer)

    def generate(
        self,
        pixels_BCHW: npt.NDArray[np.float32],
        questions: Sequence[Sequence[int] | None],
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        watch: Stopwatch,
        decoding: Decoding = GREEDY,
    ) -> list[tuple[int, ...]]:
        """One batch from pixels and ids to generated ids (end token excluded); what `answer` and `qforge tune` share.

        A row is `num_return_sequences` texts, one after the other.
        """
        prefix_BQD = self._encoder.encode(pixels_BCHW, questions, watch)
        return self._decoder.generate(prefix_BQD, prompts, max_new_tokens, watch, decoding, self._stops(decoding))

    def prefixes(self, requests: Sequence[Request]) -> npt.NDArray[np.float32]:
        """What the language model reads of each image before its prompt: [B, Q, D].

        Raises:
            ImageError, InputError, BundleError: as `answer`.
        """
        self._weights.check()
        manifest = self.bundle.manifest
        if not requests:
            raise InputError("expected at least one image, found an empty list")
        questions = [self._question_ids(request) for request in requests]
        found: dict[int, npt.NDArray[np.float32]] = {}
        sides = [manifest.side(request.image_size) for request in requests]
        for rows in one_size_batches(sides, manifest.limits.max_batch):
            images = [requests[row].image for row in rows]
            pixels_BCHW = preprocess_batch(images, manifest.preprocess.at(sides[rows[0]]))
            prefix_BQD = self._encoder.encode(pixels_BCHW, [questions[row] for row in rows], Stopwatch())
            found |= dict(zip(rows, prefix_BQD, strict=True))
        return np.stack([found[row] for row in range(len(requests))])

    def fitted(self, request: Request, max_new_tokens: int | None = None) -> Request:
        """The request with as many of its latest turns as the bundle has positions for; turns go whole.

        Raises:
            InputError: the question does not fit alone, or any other fault of its texts or of `max_new_tokens`.
        """
        new_tokens, turns = self._new_tokens(max_new_tokens), request.turns
        check_new_tokens(new_tokens, self.bundle.manifest.limits)

        def with_latest(count: int) -> Request:
            return replace(request, turns=turns[len(turns) - count :])

        def positions(count: int) -> int:
            return self.bundle.manifest.model.queries + len(self._prompt_ids(with_latest(count)))

        def too_long(count: int) -> bool:
            needed = positions(count)  # not below: a text that is none is no text that is too long
            try:
                self._decoder.check_positions(needed, new_tokens)
            except InputError:
                return True
            return False

        self._decoder.check_positions(positions(0), new_tokens)
        return with_latest(bisect_left(range(1, len(turns) + 1), True, key=too_long))

    def statistics(self) -> Statistics:
        """What was remembered and what came again: by tier of the query cache, and of prompts."""
        return self.cache.statistics() | self._decoder.statistics()

    def close(self) -> None:
        """Free the graphs."""
        self._engines.close()

    def _spoken(self, generated: Sequence[tuple[int, ...]]) -> list[Alternative]:
        return [Alternative(self._tokenizer.decode(ids), ids) for ids in generated]

    def _new_tokens(self, asked: int | None) -> int:
        return self.bundle.manifest.generation.max_new_tokens if asked is None else asked

    def _stops(self, decoding: Decoding) -> StopStrings | None:
        return StopStrings(self._tokenizer, decoding.stop_strings) if decoding.stop_strings else None

    def _prompt_ids(self, request: Request) -> list[int]:
        return self._tokenizer.encode(self._prompt(request))

    def _prompt(self, request: Request) -> str:
        return request.filled_prompt(**self._templates)

    def _question_ids(self, request: Request) -> list[int] | None:
        """Ids for the Q-Former; None where it reads no text for this request, or none at all.

        A text beyond the Q-Former's limit is cut and keeps its end token, as in training and as published (LAVIS
        max_txt_len); the language model still reads the whole question.
        """
        if self._qformer_tokenizer is None:
            return None
        reads = self.bundle.manifest.model.qformer_reads
        text = qformer_text(reads, request.question, request.own_prompt(**self._templates))
        if text is None:
            return None
        return cut(self._qformer_tokenizer.encode(text), self.bundle.manifest.limits.max_question_tokens)


def answer_of(request: Request, spoken: Sequence[Alternative], timings_ms: dict[str, float]) -> Answer:
    """What a request got: its first text, and the others."""
    first, *others = spoken
    name, question = request.image_name, request.question
    return Answer(name, question, first.text, first.token_ids, timings_ms, tuple(others))


def one_size_batches(sides: Sequence[int | None], largest: int) -> list[list[int]]:
    """Row numbers in batches of one image size each, in the order in which the sizes appear."""
    batches = list[list[int]]()
    for side in dict.fromkeys(sides):
        rows = [row for row, its in enumerate(sides) if its == side]
        batches += [rows[start : start + largest] for start in range(0, len(rows), largest)]
    return batches
