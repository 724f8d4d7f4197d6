"""Pictures for the report: test images beside every answer, and where the time goes.

The images are evenly spaced over the test set, not chosen by result.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figure import FAINT, INK, new_figure, save
from benchmarks.items import PLURAL, Scored, Task, Tasks, spread
from runtime.dataset import Row
from runtime.preprocess import load_image
from runtime.stopwatch import PHASES

COLUMNS = 2
CARD_WIDTH_IN = 6.4
LINE_IN = 0.185
"""Height of a line of text (inches)."""
WRAP = 48
"""Characters of an answer per line."""
LABEL = 15
"""Characters of a pipeline's name."""

RIGHT, WRONG = "#1a7f4b", "#b3261e"
PHASE_COLOURS = dict(zip(PHASES, ("#9aa1b2", "#0072b2", "#56b4e9", "#009e73", "#e69f00"), strict=True))
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""

Line = tuple[str, str, str]
"""(label, text, colour of the text)."""


def draw_answers(tasks: Tasks, scored: Mapping[Task, Mapping[str, Scored]], count: int, path: Path) -> None:
    """Save `count` test images, each beside references and answers; one question per image."""
    cards = [_card(row, tasks, scored) for row in _shown(tasks, count)]
    pairs = [cards[start : start + COLUMNS] for start in range(0, len(cards), COLUMNS)]
    heights = [max(2.2, LINE_IN * max(len(lines) for _, lines in pair) + 0.2) for pair in pairs]
    figure = new_figure(CARD_WIDTH_IN * COLUMNS, sum(heights))
    grid = figure.add_gridspec(len(pairs), COLUMNS * 2, height_ratios=heights, width_ratios=[1, 2.15] * COLUMNS)
    figure.subplots_adjust(left=0.01, right=0.995, top=0.99, bottom=0.01, wspace=0.03, hspace=0.06)
    for number, (row, lines) in enumerate(cards):
        place = number // COLUMNS, number % COLUMNS * 2
        picture = figure.add_subplot(grid[place])
        picture.imshow(load_image(row.image), interpolation="nearest")
        picture.set_anchor("N")
        picture.set_xticks([])
        picture.set_yticks([])
        for spine in picture.spines.values():
            spine.set_color("#d5d9e2")
        _write_lines(figure.add_subplot(grid[place[0], place[1] + 1]), lines, heights[place[0]])
    save(figure, path)


def draw_latency(result: Mapping[str, Any], path: Path) -> None:
    """Save the median time by phase of every pipeline, one panel per task at its smallest batch."""
    smallest = min(case["batch"] for case in result["latency"])
    tasks = list(dict.fromkeys(case["task"] for case in result["latency"]))
    bars = {task: _bars(result, task, smallest) for task in tasks}
    rows = max(len(of) for of in bars.values())
    figure = new_figure(CARD_WIDTH_IN * len(tasks), 0.42 * rows + 1.35)
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axis, (task, of_task) in zip(axes, bars.items(), strict=True):
        for height, (_, phases_ms, total_ms) in enumerate(of_task):
            left = 0.0
            for phase, ms in phases_ms.items():
                axis.barh(height, ms, left=left, height=0.66, color=PHASE_COLOURS[phase], label=phase)
                left += ms
            axis.text(left, height, f"  {total_ms:.1f} ms", va="center", fontsize=8.5, color=INK)
        axis.set_yticks(range(len(of_task)), [label for label, _, _ in of_task], fontsize=9)
        axis.invert_yaxis()
        axis.margins(x=0.16)
        axis.set_title(f"{PLURAL[task]}, batch {smallest}", fontsize=10.5, loc="left", color=INK)
        axis.set_xlabel("milliseconds, median", fontsize=8.5, color=FAINT)
        axis.tick_params(length=0, labelsize=8.5, colors=INK)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    handles = [axes[0].barh(0, 0, color=colour) for colour in PHASE_COLOURS.values()]
    figure.legend(handles, list(PHASE_COLOURS), loc="lower center", ncols=len(PHASES), frameon=False, fontsize=8.5)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    save(figure, path)


def _shown(tasks: Tasks, count: int) -> list[Row]:
    """One row per image, of images that every task asks about where there are such."""
    of_task = [{row.image: row for row in reversed(rows)} for rows in tasks.values()]
    common = [row for image, row in of_task[0].items() if all(image in other for other in of_task)]
    return spread(common[::-1] or list(of_task[0].values()), count)


def _card(shown: Row, tasks: Tasks, scored: Mapping[Task, Mapping[str, Scored]]) -> tuple[Row, list[Line]]:
    """Everything said about one image: for each task the first item that shows it."""
    lines: list[Line] = []
    for task, rows in tasks.items():
        number = next((number for number, row in enumerate(rows) if row.image == shown.image), None)
        if number is None:
            continue
        row = rows[number]
        references = row.captions if task == "caption" else row.answers
        lines += [("", "", INK)] if lines else []
        lines += _wrapped("", row.question or "Caption", INK)
        lines += _wrapped("reference", " / ".join(dict.fromkeys(references[:3])), FAINT)
        for name, one in scored[task].items():
            headline, scores = next(iter(one.scores.items()))
            lines += _wrapped(name, *_marked(one.answers[number].text, scores[number], headline))
    return shown, lines


def _marked(text: str, score: float, metric: str) -> tuple[str, str]:
    """The answer with its verdict; a caption that only differs from the references is not thereby wrong."""
    if metric == "exact_match" and score < 1:
        return text, INK
    return (f"✓ {text}", RIGHT) if score >= 0.5 else (f"✗ {text}", WRONG)


def _wrapped(label: str, text: str, colour: str) -> list[Line]:
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    first, *others = textwrap.wrap(shown, WRAP) or [""]
    return [(label, first, colour), *(("", other, colour) for other in others)]


def _write_lines(axis: Any, lines: Sequence[Line], height_in: float) -> None:
    axis.set_axis_off()
    axis.set_xlim(0, 1)
    axis.set_ylim(height_in, 0)
    for number, (label, text, colour) in enumerate(lines):
        y = LINE_IN * (number + 0.5)
        title = not label and colour == INK
        shown = label if len(label) <= LABEL else label[: LABEL - 1] + "…"
        axis.text(0.02, y, shown, fontsize=8, color=FAINT, va="center", parse_math=False)
        weight = "bold" if title else "normal"
        place = 0.02 if title else 0.25
        # A dollar sign in an answer is a dollar sign, not the start of a formula.
        axis.text(place, y, text, fontsize=8.8, color=colour, va="center", weight=weight, parse_math=False)


def _bars(result: Mapping[str, Any], task: str, batch: int) -> list[tuple[str, dict[str, float], float]]:
    """(label, phase → median ms, median total ms) per pipeline; of a cache hit only the bundles, which have a cache."""
    bars = []
    for case in result["latency"]:
        if (case["task"], case["batch"]) != (task, batch):
            continue
        for name, one in case["pipelines"].items():
            if case["cache"] == "hit" and one["time_over_eager"] is None:
                continue
            label = f"{name}, cache hit" if case["cache"] == "hit" else name
            bars.append((label, {phase: one["p50_ms"][phase] for phase in PHASES}, one["p50_ms"]["total"]))
    return bars
