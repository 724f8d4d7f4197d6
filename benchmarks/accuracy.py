"""Right answers, and the same answers: every pipeline on the same held-out items, judged item by item.

Two questions are kept apart. Is the answer right? Scores of `runtime.scoring`, with intervals. Is it the answer that
eager PyTorch gives? Greedy token ids, compared item by item: the sharpest test of a bundle, which no averaging hides.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.caption_metrics import corpus_scores
from benchmarks.contestants import EAGER, Capped, Contestant
from benchmarks.items import PLURAL, Scored, Task, Tasks
from benchmarks.swap import with_swapped_images
from runtime.answers import Answer, Answerer
from runtime.dataset import Row
from runtime.estimates import mean_difference, mean_score
from runtime.evaluate import evaluate
from runtime.progress import Progress
from runtime.scoring import question_prior
from trainer.scorers import item_scorers

ScoredByName: TypeAlias = Mapping[Task, Mapping[str, Scored]]


def answer_tasks(
    contestants: Sequence[Contestant],
    tasks: Tasks,
    *,
    batch_size: int,
    max_new_tokens: int,
    remark: str,
    progress: Progress,
) -> dict[Task, dict[str, Scored]]:
    """Every pipeline's answers to every item, by task and pipeline name; `remark` ends the progress bar's title."""
    scored: dict[Task, dict[str, Scored]] = {task: {} for task in tasks}
    for one in contestants:
        with one.open(True) as opened:
            answerer = Capped(opened, max_new_tokens)
            for task, rows in tasks.items():
                title = f"{one.name}: {PLURAL[task]}{remark}"
                scored[task][one.name] = answer_all(answerer, rows, task, batch_size, title, progress)
    return scored


def swap_images(tasks: Tasks, hashes: Mapping[Path, str], seed: int) -> dict[Task, list[Row]]:
    """The questions with their images swapped, as tasks; none when there are no two images to swap."""
    questions = tasks.get("vqa", ())
    if len({hashes[row.image] for row in questions}) < 2:
        return {}
    return {"vqa": with_swapped_images(questions, hashes, seed)}


def answer_all(
    answerer: Answerer, rows: Sequence[Row], task: Task, batch_size: int, title: str, progress: Progress
) -> Scored:
    """Answer every row, in batches, and score each answer; `title` names the progress bar."""
    with progress.bar(title, -(-len(rows) // batch_size), items_per_step=batch_size) as bar:
        answers = evaluate(
            answerer, rows, task=task, batch_size=batch_size, progress=lambda done, total: bar.advance()
        ).answers
    pairs = list(zip(answers, rows, strict=True))
    scorers = item_scorers(task, rows)
    scores = {name: tuple(float(score(answer.text, row)) for answer, row in pairs) for name, score in scorers.items()}
    return Scored(answers, scores)


def compare_answers(
    tasks: Tasks, scored: ScoredByName, swapped: ScoredByName, prior_rows: Sequence[Row], seed: int
) -> dict[str, Any]:
    """Scores, intervals, prior and agreement with eager, by task, as JSON."""
    compared: dict[str, Any] = {}
    for task, rows in tasks.items():
        eager = scored[task][EAGER]
        pipelines = {
            name: summarise(task, rows, one, None if name == EAGER else eager, seed)
            for name, one in scored[task].items()
        }
        for name, misled in swapped.get(task, {}).items():
            pipelines[name]["swapped_images"] = mean_score(misled.scores["accuracy"], seed)
        prior = question_prior(prior_rows, rows) if task == "vqa" and prior_rows else None
        compared[task] = {"n": len(rows), "question_prior": prior, "pipelines": pipelines}
    return compared


def summarise(task: Task, rows: Sequence[Row], scored: Scored, eager: Scored | None, seed: int) -> dict[str, Any]:
    """Scores with intervals, and difference and agreement against eager's (None for eager itself), as JSON.

    Keys: metrics (name → estimate, the headline first), by_kind (where rows have a kind), corpus (captions),
    against_eager.
    """
    result: dict[str, Any] = {"metrics": {name: mean_score(scores, seed) for name, scores in scored.scores.items()}}
    if any("kind" in row.extra for row in rows):
        result["by_kind"] = _by_kind(rows, next(iter(scored.scores.values())), seed)
    if task == "caption":
        result["corpus"] = corpus_scores([answer.text for answer in scored.answers], [row.captions for row in rows])
    if eager is not None:
        result["against_eager"] = {
            "tokens": agreement(scored.answers, eager.answers),
            "difference": {
                name: mean_difference(scores, eager.scores[name], seed) for name, scores in scored.scores.items()
            },
        }
    return result


def agreement(answers: Sequence[Answer], reference: Sequence[Answer]) -> dict[str, int]:
    """On how many of n items the greedy token ids are the reference's, every one of them."""
    pairs = list(zip(answers, reference, strict=True))
    return {"equal": sum(ours.token_ids == theirs.token_ids for ours, theirs in pairs), "n": len(pairs)}


def _by_kind(rows: Sequence[Row], scores: Sequence[float], seed: int) -> dict[str, dict[str, Any]]:
    kinds: dict[str, list[float]] = {}
    for row, score in zip(rows, scores, strict=True):
        kinds.setdefault(str(row.extra.get("kind", "other")), []).append(score)
    return {kind: mean_score(kinds[kind], seed) for kind in sorted(kinds)}
