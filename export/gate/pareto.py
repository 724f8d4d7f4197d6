"""What the candidates of a search cost and lose: the table of the bundle's card, and its plot (matplotlib's door)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.gate.trials import Candidate
from runtime.errors import BackendUnavailable, require

INK, FAINT, GOOD, BAD = "#1f2430", "#7a8194", "#1a7f4b", "#b3261e"
DPI = 130


def best_of(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats: nothing is at least as good in accuracy, size and time, and better in one."""

    def facts(one: Candidate) -> tuple[float, float, float]:
        return one.accuracy.drop, one.bytes, _share(one)

    def beaten(one: Candidate) -> bool:
        mine = facts(one)
        return any(
            theirs != mine and all(a <= b for a, b in zip(theirs, mine, strict=True))
            for theirs in map(facts, candidates)
        )

    return [one for one in candidates if not beaten(one)]


def table(candidates: Sequence[Candidate], chosen: Candidate, max_drop: float) -> str:
    """Markdown: one line per candidate, in the order of the search; what no other beats is marked."""
    front = best_of(candidates)
    lines = [
        "| candidate | nodes restored | points lost | 95 % interval | MiB | ms | fp32 ms | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in candidates:
        at = one.accuracy
        marks = [
            "**in this bundle**" if one is chosen else "",
            "" if at.holds(max_drop) else "loses too much",
            "unbeaten" if one in front else "",
        ]
        lines.append(
            f"| {one.what} | {one.nodes} | {at.drop:.2f} | {at.low:.2f} to {at.high:.2f} | {one.bytes / 2**20:.2f} | "
            f"{_shown(one.ms)} | {_shown(one.fp32_ms)} | {', '.join(filter(None, marks))} |"
        )
    return "\n".join(lines)


def _share(one: Candidate) -> float:
    """Of the fp32 graphs' time; the same for all where a CPU cannot run the graphs."""
    return one.ms / one.fp32_ms if one.ms is not None and one.fp32_ms else 1.0


def _shown(ms: float | None) -> str:
    return "not on a CPU" if ms is None else f"{ms:.2f}"


def require_plot() -> Any:
    """matplotlib's figure module; BackendUnavailable where it is not installed."""
    return require("matplotlib.figure", extra="bench", why="The plot of the accuracy gate (export.gate.plot)")


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    try:
        require_plot()
    except BackendUnavailable:
        return False
    return True


def draw(candidates: Sequence[Candidate], chosen: Candidate, max_drop: float, metric: str, path: Path) -> None:
    """Save the plot: points lost over size, and over time; the bars are 95 % intervals."""
    figure = require_plot().Figure(figsize=(10.4, 4.2))
    axes = figure.subplots(1, 2, sharey=True)
    places = (
        ("size of all graphs (MiB)", [one.bytes / 2**20 for one in candidates]),
        ("time, as a share of the fp32 graphs'", [_share(one) for one in candidates]),
    )
    for axis, (label, across) in zip(axes, places, strict=True):
        for x, one in zip(across, candidates, strict=True):
            at = one.accuracy
            colour = GOOD if at.holds(max_drop) else BAD
            axis.plot([x, x], [at.low, at.high], color=colour, linewidth=1, alpha=0.35)
            axis.plot(x, at.drop, "o", color=colour, markersize=10 if one is chosen else 5)
            if one is chosen:
                axis.annotate(
                    f"  this bundle, {one.nodes} restored", (x, at.drop), fontsize=8.5, color=INK, va="center"
                )
        axis.axhline(max_drop, color=FAINT, linewidth=1, linestyle="--")
        axis.set_xlabel(label, fontsize=9, color=FAINT)
        axis.margins(x=0.25)
        axis.tick_params(length=0, labelsize=8.5, colors=INK)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylabel(f"points of '{metric}' lost against eager", fontsize=9, color=FAINT)
    axes[0].set_title(f"dashed: {max_drop:g} points may be lost", fontsize=9, loc="left", color=INK)
    figure.tight_layout()
    figure.savefig(path, dpi=DPI, facecolor="white")
