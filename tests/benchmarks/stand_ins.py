"""Tiny honest pipelines and rows: they really answer, from a rule one can follow by hand."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.contestants import Contestant
from runtime.answers import Answer, Answerer, Request
from runtime.dataset import Row
from runtime.decoding import GREEDY, Decoding
from runtime.stopwatch import PHASES

WORDS = ["red", "green", "blue", "yes", "no", "a", "circle"]


@dataclass
class Parrot:
    """Says the image's own colour, which is its file name, or what `instead` says for that question."""

    name: str = "parrot"
    instead: dict[str | None, str] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    """Names of all pipelines that share this list, in the order they were asked."""
    limits: list[int | None] = field(default_factory=list)

    def answer(
        self, requests: Sequence[Request], *, max_new_tokens: int | None = None, decoding: Decoding = GREEDY
    ) -> list[Answer]:
        self.calls.append(self.name)
        self.limits.append(max_new_tokens)
        return [self._one(request, max_new_tokens) for request in requests]

    def _one(self, request: Request, max_new_tokens: int | None) -> Answer:
        colour = Path(str(request.image)).stem.split("-")[0]
        ids = tuple(WORDS.index(word) for word in self.instead.get(request.question, colour).split())[:max_new_tokens]
        timings_ms = {**dict.fromkeys(PHASES, 2.0), "total": 10.0}
        return Answer(request.image_name, request.question, " ".join(WORDS[i] for i in ids), ids, timings_ms)


def contestant(name: str, pipeline: Answerer, opened: list[bool] | None = None) -> Contestant:
    """A pipeline that takes part; `opened` notes whether it was opened with its cache."""

    def open_it(cached: bool) -> AbstractContextManager[Answerer]:
        if opened is not None:
            opened.append(cached)
        return nullcontext(pipeline)

    return Contestant(name, "eager" if name == "eager" else "bundle", Path(name), {}, open_it)


def question_row(image: Path, question: str, *answers: str, **extra: Any) -> Row:
    return Row(image, image.stem, (), question, answers, extra)


def caption_row(image: Path, *captions: str, **extra: Any) -> Row:
    return Row(image, image.stem, captions, None, (), extra)


def colour_images(folder: Path) -> list[Path]:
    """red.png, green.png, blue.png, and red-again.png with the very bytes of red.png."""
    paths = []
    for colour in ("red", "green", "blue"):
        paths.append(folder / f"{colour}.png")
        Image.new("RGB", (24, 16), colour).save(paths[-1])
    paths.append(folder / "red-again.png")
    paths[-1].write_bytes(paths[0].read_bytes())
    return paths
