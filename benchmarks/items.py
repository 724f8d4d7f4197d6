"""The held-out items, and what one pipeline said to each of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

from runtime.answers import Answer
from runtime.dataset import Row

Task: TypeAlias = Literal["caption", "vqa"]
_Item = TypeVar("_Item")
Tasks: TypeAlias = Mapping[Task, Sequence[Row]]
"""The items of every task that is measured; never an empty sequence."""

PLURAL: dict[Task, str] = {"caption": "captions", "vqa": "questions"}
"""For people."""


@dataclass(frozen=True)
class Scored:
    """One pipeline's answers to the items of a task."""

    answers: tuple[Answer, ...]
    """In the order of the rows."""
    scores: Mapping[str, tuple[float, ...]]
    """Metric → one score per item (0 to 1); the first metric is the task's headline."""


def fitting(task: Task, rows: Sequence[Row], items: int | None) -> list[Row]:
    """Rows of the task, or `items` of them evenly spaced over the file (neighbours often share an image)."""
    fits = [place for place, row in enumerate(rows) if _fits(task, row)]
    return [rows[place] for place in (fits if items is None else spread(fits, items))]


def _fits(task: Task, row: Row) -> bool:
    return bool(row.captions if task == "caption" else row.question and row.answers)


def spread(rows: Sequence[_Item], count: int) -> list[_Item]:
    """At most `count` rows, evenly spaced, in order."""
    taken = min(count, len(rows))
    return [rows[i * len(rows) // taken] for i in range(taken)]


def answer_lines(
    task: Task, rows: Sequence[Row], scored: Mapping[str, Scored], swapped: Mapping[str, Scored]
) -> list[dict[str, Any]]:
    """One JSON-able line per item: what was asked, the references, and what every pipeline said."""
    lines = []
    for number, row in enumerate(rows):
        line: dict[str, Any] = {"task": task, "image_id": row.image_id, "question": row.question}
        line["references"] = list(row.captions if task == "caption" else row.answers)
        if "kind" in row.extra:
            line["kind"] = row.extra["kind"]
        line["answers"] = {name: _said(one, number) for name, one in scored.items()}
        if swapped:
            line["with_swapped_image"] = {name: _said(one, number) for name, one in swapped.items()}
        lines.append(line)
    return lines


def _said(scored: Scored, number: int) -> dict[str, Any]:
    answer = scored.answers[number]
    scores = {name: scores[number] for name, scores in scored.scores.items()}
    return {"text": answer.text, "token_ids": list(answer.token_ids), "scores": scores}
