"""Tiny honest pipelines and rows: they really answer, from a rule one can follow by hand."""

from collections.abc import Callable, Mapping, Sequence
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
from trainer.logs.journal import Journal
from trainer.logs.lines import LossLines

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


SPEED: dict[str, float] = {"samples_per_s": 40.0, "data_wait_share": 0.125, "model_flop_utilisation": 0.5}


def write_log(
    folder: Path,
    stage: str,
    lines: Mapping[str, LossLines],
    losses: Callable[[int], dict[str, float]],
    *,
    steps: int = 40,
    alarm: str | None = None,
    peaks: Sequence[tuple[int, float, str]] = ((1, 1e12, "data sheet"),),
) -> Path:
    """A checkpoint folder that holds a log and nothing else; `peaks`: from a step on, FLOP/s, source."""
    with Journal(folder / "training.jsonl", 0) as journal:
        told = {name: of.numbers() for name, of in lines.items()}
        journal.write("run", 0, {"stage": stage, "steps": steps, "batch_size": 64, "lines": told})
        for step in range(1, steps + 1):
            for _, flops, source in (peak for peak in peaks if peak[0] == step):
                known = {"per_step_and_process": 10**9, "peak_per_second": flops, "peak": source}
                journal.write("event", step, {"event": "flops", **known})
            facts = {"losses": losses(step), "learning_rates": [1e-3 * step, 1e-3 * step], "gradient_norm": 1.0 / step}
            journal.write("step", step, {**facts, "speed": SPEED if step > 1 else dict.fromkeys(SPEED)})
        for step in (20, 40):
            journal.write("held_out", step, {"metrics": {"itm_accuracy": step / 80, "itc_loss": 4 - step / 40}})
        if alarm is not None:
            journal.write("event", 30, {"event": "alarm", "alarm": alarm, "text": "…"})
    return folder
