"""One scorer for eager PyTorch and for every bundle: answer a data set, keep each answer, average the scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

from runtime.answers import Answer, Answerer, Request
from runtime.dataset import Row
from runtime.decoding import GREEDY, Decoding
from runtime.errors import DataError, InputError
from runtime.scoring import caption_exact, vqa_score

Scorer = Callable[[str, Row], float]
"""(generated text, row) → score from 0 to 1."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of one pipeline on one data set."""

    metrics: dict[str, float]
    """Name → mean over the items (0 to 1)."""
    n: int
    """Items answered."""
    settings: dict[str, Any]
    """What was asked, so the numbers can be made again."""
    answers: tuple[Answer, ...]
    """One per item, in the order of the rows."""

    def as_json(self) -> dict[str, Any]:
        """Metrics, n and settings, ready for `json.dumps`; the answers stay out."""
        return {"metrics": dict(self.metrics), "n": self.n, "settings": dict(self.settings)}


def evaluate(
    answerer: Answerer,
    rows: Sequence[Row],
    *,
    task: Literal["caption", "vqa"],
    batch_size: int,
    image_size: int | None = None,
    decoding: Decoding = GREEDY,
    scorers: Mapping[str, Scorer] = MappingProxyType({}),
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Caption the rows that have captions, or answer those with an answered question; other rows are passed over.

    `image_size` is the side (pixels) that images are read at, None the trained one; `decoding` how texts are said;
    `scorers` adds named metrics;
    `progress` is told (items done, items in all) after every batch.

    Raises:
        InputError: the batch size is below 1.
        DataError: no row fits the task.
    """
    if batch_size < 1:
        raise InputError(f"batch_size: expected at least 1, found {batch_size}")
    items = rows_for(rows, task)
    answers: list[Answer] = []
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        answers += answerer.answer([_request(row, task, image_size) for row in batch], decoding=decoding)
        if progress is not None:
            progress(len(answers), len(items))
    own: Mapping[str, Scorer] = {METRICS[task]: SCORERS[task]}
    metrics = {
        name: sum(score(answer.text, row) for answer, row in zip(answers, items, strict=True)) / len(items)
        for name, score in {**own, **scorers}.items()
    }
    settings: dict[str, Any] = {"task": task, "batch_size": batch_size} | (
        {"image_size": image_size} if image_size else {}
    )
    settings |= {} if decoding == GREEDY else {"decoding": asdict(decoding)}
    return Evaluation(metrics, len(items), settings, tuple(answers))


def rows_for(rows: Sequence[Row], task: Literal["caption", "vqa"]) -> list[Row]:
    """The rows that have captions, or answered questions; DataError when there are none."""
    fits = _has_captions if task == "caption" else _has_answers
    items = [row for row in rows if fits(row)]
    if not items:
        wanted = "captions" if task == "caption" else "questions and answers"
        raise DataError(f"expected rows with {wanted}, found none among {len(rows)}; choose the other task or file")
    return items


def score_of(answerer: Answerer, row: Row, task: Literal["caption", "vqa"]) -> float:
    """One row answered alone; its score from 0 to 1."""
    (answer,) = answerer.answer([_request(row, task, None)])
    return SCORERS[task](answer.text, row)


def _request(row: Row, task: Literal["caption", "vqa"], image_size: int | None) -> Request:
    return Request(row.image, row.question if task == "vqa" else None, image_size=image_size)


def _has_captions(row: Row) -> bool:
    return bool(row.captions)


def _has_answers(row: Row) -> bool:
    return row.question is not None and bool(row.answers)


def _exact_match(text: str, row: Row) -> float:
    return float(caption_exact(text, row.captions))


def _accuracy(text: str, row: Row) -> float:
    return vqa_score(text, row.answers)


METRICS: Mapping[str, str] = {"caption": "exact_match", "vqa": "accuracy"}
"""Task → name of its own metric."""
SCORERS: Mapping[str, Scorer] = {"caption": _exact_match, "vqa": _accuracy}
"""Task → what that is."""
