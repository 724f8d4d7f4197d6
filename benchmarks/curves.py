"""Training curves from `training.jsonl`: losses between chance and floor, held-out metrics, rates, gradients.

One column per stage. Faint: the logged steps; strong: their moving average. A red mark is an alarm.

    python -m benchmarks.curves runs/demo/steps/stage1 runs/demo/checkpoint training.png
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.figure import FAINT, INK, new_figure, save
from trainer.logs.journal import FILE, Record, read_journal

COLUMN_IN, TITLE_IN, LEGEND_IN = 5.6, 0.8, 0.3
LOSS_IN, HELD_OUT_IN, RATE_IN = 1.75, 1.75, 1.15
"""Heights of the panels (inches)."""
BLUE, ORANGE, GREEN, SKY, YELLOW, PINK = "#0072b2", "#d55e00", "#009e73", "#56b4e9", "#e69f00", "#cc79a7"
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""
METRICS = (BLUE, ORANGE, GREEN, PINK, YELLOW, SKY)
ALARM = "#b3261e"
LINE_STYLES = {"chance": (0, (6, 3)), "prior": (0, (4, 2, 1, 2)), "floor": (0, (1, 2))}
LOG_FROM = 30
"""Largest value over smallest from which a curve is drawn on a logarithmic scale."""
CROWDED_FROM = 100
"""… and from which its scale names powers of ten alone."""
SMOOTHED_OVER = 20
"""The moving average spans this part of the curve."""
TOTAL = "loss"
OF_LOSS = {"gradient_exploding": "gradient norm", "loss_rising": TOTAL}
"""Panel of an alarm that is not named for its loss."""

Series = list[tuple[int, float]]


def draw_training(stages: Sequence[Path], path: Path) -> None:
    """Save the curves of the stages whose checkpoints (or logs) are given, side by side."""
    logs = [read_journal(stage / FILE if stage.is_dir() else stage) for stage in stages]
    panels = max(len(_loss_names(log)) for log in logs)
    heights = [LOSS_IN * max(panels, 1.4), HELD_OUT_IN, RATE_IN, RATE_IN]
    figure = new_figure(COLUMN_IN * len(logs), sum(heights) + TITLE_IN + LEGEND_IN)
    height_in = sum(heights) + TITLE_IN + LEGEND_IN
    grid = figure.add_gridspec(4, len(logs), height_ratios=heights, hspace=0.36, wspace=0.16)
    left, right = 0.5 / (COLUMN_IN * len(logs)), 1 - 0.12 / (COLUMN_IN * len(logs))
    figure.subplots_adjust(left=left, right=right, top=1 - TITLE_IN / height_in, bottom=(LEGEND_IN + 0.2) / height_in)
    for column, log in enumerate(logs):
        _draw_stage(figure, grid, column, log)
    save(figure, path)


def _draw_stage(figure: Any, grid: Any, column: int, log: list[Record]) -> None:
    names = _loss_names(log)
    losses = grid[0, column].subgridspec(len(names), 1, hspace=0.5)
    axes = {name: figure.add_subplot(losses[number]) for number, name in enumerate(names)}
    others = ("held out", "learning rate", "gradient norm")
    axes |= {name: figure.add_subplot(grid[number, column]) for number, name in enumerate(others, 1)}
    for name in names:
        _draw_loss(axes[name], log, name)
    _draw_held_out(axes["held out"], log, names)
    _draw_rates(axes["learning rate"], log)
    _draw_curve(axes["gradient norm"], _series(log, lambda step: step["gradient_norm"]), PINK)
    last = max(_steps(log)[-1]["step"], 2)
    for name, axis in axes.items():
        _dress(axis, name, last)
        for event in log:
            if event.get("event") == "resume":
                axis.axvline(event["step"], color=FAINT, linewidth=0.7, alpha=0.45, zorder=0)
            elif event.get("event") == "alarm" and _panel_of(event["alarm"], names) == name:
                _mark(axis, event)
    axes["gradient norm"].set_xlabel("optimiser steps", fontsize=8.5, color=FAINT)
    first = axes[names[0]]
    title, details = _title(log)
    above = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "bottom"}
    first.annotate(title, (0, 1), (0, 33), fontsize=13, weight="bold", color=INK, **above)
    first.annotate(details, (0, 1), (0, 21), fontsize=7, color=FAINT, **above)


def _draw_loss(axis: Any, log: list[Record], name: str) -> None:
    """The curve, its lines, and the same loss on held-out data where it is measured."""
    curve = _series(log, lambda step: step["losses"][name])
    _draw_curve(axis, curve, BLUE)
    held_out = [
        (r["step"], float(r["metrics"][f"{name}_loss"])) for r in _held_out(log) if f"{name}_loss" in r["metrics"]
    ]
    if held_out:
        axis.plot(*zip(*held_out, strict=True), "o-", color=ORANGE, markersize=4, linewidth=1)
        below = {"textcoords": "offset points", "ha": "center", "va": "top", "fontsize": 8}
        axis.annotate("held out", held_out[0], (0, -5), color=ORANGE, **below)
    axis.margins(y=0.16)  # room for the names of the lines
    lines = log[0]["lines"].get(name, {})
    for kind, style in LINE_STYLES.items():
        value = lines.get(kind)
        if value is not None and (value > 0 or axis.get_yscale() == "linear"):
            axis.axhline(value, color=FAINT, linewidth=1, linestyle=style, zorder=1)
            place = "bottom" if kind == "chance" else "top"
            axis.annotate(
                f"{kind} {value:.4g}",
                (0.995, value),
                xycoords=("axes fraction", "data"),
                xytext=(0, 2 if place == "bottom" else -2),
                textcoords="offset points",
                ha="right",
                va=place,
                fontsize=7.5,
                color=FAINT,
            )


def _draw_held_out(axis: Any, log: list[Record], losses: Sequence[str]) -> None:
    """Every metric but the losses, which stand in the panels of their own."""
    in_panels = {f"{name}_loss" for name in losses}
    names = dict.fromkeys(name for r in _held_out(log) for name in r["metrics"] if name not in in_panels)
    for name, colour in zip(names, METRICS * len(names), strict=False):
        series = [(r["step"], float(r["metrics"][name])) for r in _held_out(log) if name in r["metrics"]]
        label = f"{name.replace('_', ' ')} {series[-1][1]:.3g}"
        axis.plot(*zip(*series, strict=True), "o-", color=colour, markersize=4, linewidth=1.4, label=label)
    if names:
        axis.legend(loc="best", fontsize=7.5, framealpha=0.8, edgecolor="none")
        if axis.dataLim.ymin >= 0:
            axis.set_ylim(0, max(axis.get_ylim()[1], 0.1))
    else:
        axis.text(0.5, 0.5, "not measured yet", transform=axis.transAxes, ha="center", color=FAINT, fontsize=8.5)


def _draw_rates(axis: Any, log: list[Record]) -> None:
    """One line per rate; groups that have the same are one."""
    groups = zip(*(step["learning_rates"] for step in _steps(log)), strict=True)
    for rates in dict.fromkeys(groups):
        axis.plot([step["step"] for step in _steps(log)], rates, color=GREEN, linewidth=1.4)
    axis.set_ylim(bottom=0)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    axis.yaxis.get_offset_text().set(fontsize=7.5, color=FAINT)


def _draw_curve(axis: Any, curve: Series, colour: str) -> None:
    """Logged steps and their moving average; on a logarithmic scale where they span more than a linear one shows."""
    steps, values = zip(*curve, strict=True)
    width = max(1, len(values) // SMOOTHED_OVER)
    axis.plot(steps, values, color=colour, linewidth=0.9, alpha=0.35 if width > 1 else 1)
    if width > 1:
        axis.plot(steps, _moving_average(values, width), color=colour, linewidth=1.8)
    finite = [value for value in values if math.isfinite(value)]
    if min(finite, default=0) > 0 and max(finite) > LOG_FROM * min(finite):
        axis.set_yscale("log", subs=[])
        crowded = max(finite) > CROWDED_FROM * min(finite)
        axis.yaxis.get_major_locator().set_params(subs=(1,) if crowded else (1, 2, 5))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _moving_average(values: Sequence[float], width: int) -> list[float]:
    """Mean of up to `width` values on either side; near the ends of as many as there are on both."""
    spans = (min(width, place, len(values) - 1 - place) for place in range(len(values)))
    return [sum(values[p - s : p + s + 1]) / (2 * s + 1) for p, s in enumerate(spans)]


def _dress(axis: Any, name: str, last: int) -> None:
    axis.set_title(name, fontsize=9.5, loc="left", color=INK, pad=3)
    axis.set_xlim(0, last)
    axis.tick_params(length=2.5, labelsize=8, colors=INK, color="#c3c8d4")
    axis.grid(axis="y", color="#eceef3", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axis.spines[side].set_color("#c3c8d4")


def _mark(axis: Any, event: Record) -> None:
    axis.axvline(event["step"], color=ALARM, linewidth=1.2)
    axis.annotate(
        f"alarm: {event['alarm'].replace('_', ' ')} ",
        (event["step"], 0.06),
        xycoords=("data", "axes fraction"),
        ha="right" if event["step"] > axis.get_xlim()[1] / 2 else "left",
        fontsize=8,
        color=ALARM,
    )


def _panel_of(alarm: str, losses: Sequence[str]) -> str:
    """Where an alarm is marked: the panel of its loss; a sum that has none is marked in the first."""
    name = OF_LOSS.get(alarm, alarm.removesuffix("_stuck"))
    return name if name in losses or name not in (TOTAL,) else losses[0]


def _title(log: list[Record]) -> tuple[str, str]:
    """Stage, and what one wants to know of its speed (medians)."""
    run, steps = log[0], _steps(log)
    facts = [f"{steps[-1]['step']:,} of {run['steps']:,} steps x {run['batch_size']:,}"]
    for name, text in (("samples_per_s", "{:.3g} samples/s"), ("data_wait_share", "data wait {:.2%}")):
        found = [step["speed"][name] for step in steps if step["speed"][name] is not None]
        facts += [text.format(median(found))] if found else []
    return str(run["stage"]), " · ".join(facts + _utilisation(log))


def _utilisation(log: list[Record]) -> list[str]:
    """MFU, and whether the peak it is a share of was measured: then it is the highest of this stage, for all steps."""
    peaks, done = list[Record](), list[float]()  # FLOP/s
    for record in log:
        if record.get("event") == "flops":
            peaks.append(record)
        elif record["kind"] == "step" and (share := record["speed"]["model_flop_utilisation"]) is not None:
            done.append(share * peaks[-1]["peak_per_second"])
    if not done:
        return []
    share = median(done) / max(peak["peak_per_second"] for peak in peaks)
    return [f"MFU {share:.2%}{' of a measured peak' if peaks[-1]['peak'] == 'measured' else ''}"]


def _loss_names(log: list[Record]) -> list[str]:
    """Losses with lines, in the objective's order; the sum where nothing else is known."""
    return [name for name in _steps(log)[-1]["losses"] if name in log[0]["lines"]] or [TOTAL]


def _steps(log: list[Record]) -> list[Record]:
    return [record for record in log if record["kind"] == "step"]


def _held_out(log: list[Record]) -> Iterator[Mapping[str, Any]]:
    return (record for record in log if record["kind"] == "held_out")


def _series(log: list[Record], value: Any) -> Series:
    """A number of every logged step."""
    return [(step["step"], float(value(step))) for step in _steps(log)]


if __name__ == "__main__":
    *folders, picture = map(Path, sys.argv[1:])
    draw_training(folders, picture)
