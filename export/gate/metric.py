"""What the gate measures: a bundle's score on held-out items beside eager's on the same items.

caption     as `qforge evaluate` scores captions; the headline is what the rows know best.
vqa         VQA accuracy.
retrieval   how often the right answer of a query comes first after re-ranking, in both directions.
agreement   share of greedy answers that are eager's, token for token: needs no labels, and is no accuracy.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.config import GateConfig, GateTask
from runtime.answers import Answer, Answerer, Request
from runtime.bundle import Bundle
from runtime.dataset import Row
from runtime.errors import DataError, InputError
from runtime.estimates import mean_score, paired_difference
from runtime.files import sha256_of
from runtime.pipeline import Pipeline
from runtime.progress import Progress
from runtime.recall import evaluate_retrieval
from runtime.retrieval import Retrieval, Retriever
from trainer.blip2 import Blip2
from trainer.generate import EagerPipeline
from trainer.retrieval import EagerRetrieval
from trainer.scorers import item_scorers
from trainer.sources.convert import read_rows

RERANKED = 16
"""Candidates that matching looks at again in the task retrieval."""
Scores = tuple[float, ...]
"""One per item, 0 to 1."""


@dataclass(frozen=True)
class Accuracy:
    """A bundle's score beside eager's; all in percent or percentage points."""

    score: float
    drop: float
    """Points lost against eager; negative when the bundle is better."""
    low: float
    high: float
    """95 % interval of the drop, paired by item."""
    method: str
    """How the interval was made."""

    def holds(self, max_drop: float) -> bool:
        """Whether no more than `max_drop` points are lost: the drop measured, not the end of its interval."""
        return round(self.drop, 6) <= max_drop  # 0.01 of 400 items is not exact in binary

    def as_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


class Metric:
    """Scores bundles of one model on one set of items; eager answers them once."""

    def __init__(
        self, model: Blip2, rows: Sequence[Row], task: GateTask, batch_size: int, seed: int, progress: Progress
    ) -> None:
        self._rows, self._batch, self._seed = rows, batch_size, seed
        self.task = task
        self._answers: Sequence[Answer] = ()
        if task == "retrieval":
            self.name = "recall at 1, re-ranked"
            self._eager = self._ranked(EagerRetrieval(model), progress)
        else:
            self.name = "answers equal to eager's" if task == "agreement" else next(iter(item_scorers(task, rows)))
            self._answers = self._answered(EagerPipeline(model), "eager PyTorch", progress)
            self._eager = self._scored(self._answers)

    @property
    def items(self) -> int:
        """How many scores are averaged."""
        return len(self._eager)

    @property
    def eager(self) -> float:
        """Eager's score (percent)."""
        return 100 * sum(self._eager) / len(self._eager)

    def measure(self, bundle: Bundle, progress: Progress) -> Accuracy:
        """Answer every item with the bundle."""
        if self.task == "retrieval":
            with Retrieval(bundle) as retrieval:
                scores = self._ranked(retrieval, progress)
        else:
            with Pipeline(bundle, cache_bytes=0) as pipeline:
                scores = self._scored(self._answered(pipeline, "the bundle", progress))
        score = 100 * sum(scores) / len(scores)
        if self.task == "agreement":  # eager agrees with itself: a constant, not a sample
            found = mean_score(scores, self._seed)
            value, low, high = 1 - found["value"], 1 - found["high"], 1 - found["low"]
        else:
            found = paired_difference(scores, self._eager, self._seed)
            value, low, high = -found["value"], -found["high"], -found["low"]
        return Accuracy(score, 100 * value, 100 * low, 100 * high, found["method"])

    def _answered(self, answerer: Answerer, who: str, progress: Progress) -> list[Answer]:
        answers, asks = list[Answer](), self.task != "caption"
        starts = range(0, len(self._rows), self._batch)
        with progress.bar(f"accuracy gate: {who} answers", len(starts), items_per_step=self._batch) as bar:
            for start in starts:
                rows = self._rows[start : start + self._batch]
                answers += answerer.answer([Request(row.image, row.question if asks else None) for row in rows])
                bar.advance()
        return answers

    def _scored(self, answers: Sequence[Answer]) -> Scores:
        if self.task == "agreement":
            pairs = zip(answers, self._answers, strict=True)
            return tuple(float(ours.token_ids == eager.token_ids) for ours, eager in pairs)
        assert self.task != "retrieval"
        score = next(iter(item_scorers(self.task, self._rows).values()))
        return tuple(float(score(answer.text, row)) for answer, row in zip(answers, self._rows, strict=True))

    def _ranked(self, retriever: Retriever, progress: Progress) -> Scores:
        hits = evaluate_retrieval(retriever, self._rows, candidates=RERANKED, progress=progress).hits
        return tuple(float(hit) for way in ("text_to_image", "image_to_text") for hit in hits[f"itm_{way}_r1"])


def gate_rows(config: GateConfig, calibrated_on: Collection[str], answers: bool, searches: bool) -> list[Row]:
    """The held-out items: rows that fit the task, at most `config.items` of them, chosen by seed.

    Args:
        config: Settings whose `max_drop` is set.
        calibrated_on: SHA-256 of the images that ranges are measured on.
        answers: Whether the bundle answers.
        searches: Whether the bundle searches.

    Raises:
        InputError: no data, no task, or a task that the bundle cannot do.
        DataError: no fitting row, or an image that serves calibration too.
    """
    if config.data is None or config.task is None:
        raise InputError(
            f"export.gate.max_drop {config.max_drop:g}: expected held-out data to measure on and its task, found "
            f"none; give --gate-data FILE --gate-task caption|vqa|retrieval|agreement"
        )
    if not (searches if config.task == "retrieval" else answers):
        does = "answer" if config.task != "retrieval" else "search"
        raise InputError(f"export.gate.task {config.task}: this bundle does not {does}; choose another task or --heads")
    fitting = [row for row in read_rows(config.data) if _fits(row, config.task)]
    if not fitting:
        wanted = "captions" if config.task in ("caption", "retrieval") else "questions with answers"
        raise DataError(f"{config.data}: expected rows with {wanted}, found none; choose another file or --gate-task")
    if config.items is not None and config.items < len(fitting):
        chosen = np.random.default_rng(config.seed).permutation(len(fitting))[: config.items]
        fitting = [fitting[number] for number in sorted(chosen)]
    images = {row.image for row in fitting}
    shared = sorted(str(image) for image in images if sha256_of(image) in set(calibrated_on))
    if shared:
        raise DataError(
            f"{config.data}: {len(shared)} of {len(images)} images are calibrated on too, the first: "
            f"{Path(shared[0]).name}; accuracy is measured on held-out images, name another file: --gate-data FILE"
        )
    return fitting


def _fits(row: Row, task: GateTask) -> bool:
    tests: dict[GateTask, Callable[[], bool]] = {
        "caption": lambda: bool(row.captions),
        "retrieval": lambda: bool(row.captions),
        "vqa": lambda: row.question is not None and bool(row.answers),
        "agreement": lambda: True,
    }
    return tests[task]()
