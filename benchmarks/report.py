"""One result → one page of Markdown. Every number on the page is read from result.json.

Write a page anew from an old result: `python -m benchmarks.report DIR/result.json > report.md`
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.items import PLURAL
from benchmarks.notes import notes

PHASE_TITLES = {
    "preprocess": "preprocess",
    "vision": "vision",
    "qformer": "Q-Former",
    "prefill": "prefill",
    "per_token": "per token",
    "total": "total p50",
}
METRIC_TITLES = {
    "accuracy": "questions: right answers, %",
    "attributes_right": "captions: every attribute right, %",
    "exact_match": "captions: equal to a reference, %",
}
FOOTPRINT_TITLES = (
    "",
    "first answer of a new process, s",
    "… start and imports",
    "… loading",
    "peak memory, MiB",
    "… after imports",
    "files, MiB",
)
MIB = 1024**2
RIGHT = "---:"

Rows = Sequence[Sequence[str]]


def render(result: Mapping[str, Any]) -> str:
    """The page: verdict, accuracy, latency by phase, memory and size, notes."""
    machine, settings = result["machine"], result["settings"]
    names = list(result["pipelines"])
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    counts = ", ".join(f"{found['n']} {PLURAL[task]}" for task, found in result["accuracy"].items())
    bundles = names[1:]
    return "\n".join(
        [
            "# Bundle against eager PyTorch",
            "",
            f"{counts}; the same items and CPU threads ({settings['threads']}) for all, one run of "
            f"{result['seconds']:.0f} s, {result['made_at']}.",
            "",
            f"Machine: {machine['cpu']}, {machine['physical_cores_usable']} cores usable, "
            f"{_number((machine['memory_bytes'] or 0) / 1024**3)} GiB memory, {machine['system']}, Python "
            f"{machine['python']}; {versions}.",
            "",
            *_verdict(result, bundles),
            "",
            "## Accuracy",
            "",
            *_table(["", *names], [RIGHT] * len(names), _accuracy_rows(result, names)),
            "",
            "In brackets: 95 % interval. Change against eager: points, with its interval over the same items.",
            "",
            "![test images with the answers of every pipeline](answers.png)",
            "",
            "## Latency by phase, milliseconds (p50 of each)",
            "",
            *_table(
                ["", "pipeline", *PHASE_TITLES.values(), "total p90", "time / eager"],
                ["---", *[RIGHT] * (len(PHASE_TITLES) + 2)],
                _latency_rows(result),
            ),
            "",
            "![median time by phase](latency.png)",
            "",
            "## Start, memory and size",
            "",
            *_table(
                FOOTPRINT_TITLES,
                [RIGHT] * (len(FOOTPRINT_TITLES) - 1),
                [_footprint_row(result, name) for name in names],
            ),
            "",
            *(_parts(name, facts) for name, facts in result["pipelines"].items()),
            "",
            "## How to read this",
            "",
            *(f"- {note}" for note in notes(result)),
            "",
        ]
    )


def _verdict(result: Mapping[str, Any], bundles: Sequence[str]) -> list[str]:
    if result["failures"]:
        return ["**The gate failed:**", "", *(f"- {failure}" for failure in result["failures"])]
    allowed = f"{result['settings']['max_drop']:g}"
    return [f"The gate holds for {', '.join(bundles)}: FP32 tokens equal eager's, quantised within {allowed} points."]


def _accuracy_rows(result: Mapping[str, Any], names: Sequence[str]) -> Rows:
    rows: list[list[str]] = []
    for task, found in result["accuracy"].items():
        of = [found["pipelines"][name] for name in names]
        for number, metric in enumerate(of[0]["metrics"]):
            rows.append([METRIC_TITLES[metric], *(_estimate(one["metrics"][metric]) for one in of)])
            if number == 0:
                rows.append(["… change against eager, points", *(_change(one, metric) for one in of)])
        for kind, first in of[0].get("by_kind", {}).items():
            rows.append([f"… {kind} ({first['n']})", *(_percent(one["by_kind"][kind]["value"]) for one in of)])
        if "swapped_images" in of[0]:
            rows.append(["… with images swapped between questions", *(_estimate(one["swapped_images"]) for one in of)])
        if found["question_prior"] is not None:
            rows.append(["… best answerer that sees only the question", *[_percent(found["question_prior"])] * len(of)])
        for metric in of[0].get("corpus", {}):
            rows.append([f"captions: {metric}", *(f"{one['corpus'][metric]:.3f}" for one in of)])
        rows.append([f"{PLURAL[task]}: token ids equal to eager's", *(_tokens(one) for one in of)])
    return rows


def _latency_rows(result: Mapping[str, Any]) -> Rows:
    rows = []
    for case in result["latency"]:
        known = ", query cache hit" if case["cache"] == "hit" else ""
        title = f"{PLURAL[case['task']]}, batch {case['batch']}{known}"
        for name, one in case["pipelines"].items():
            p50_ms = [_number(one["p50_ms"][phase]) if phase in one["p50_ms"] else "" for phase in PHASE_TITLES]
            rows.append([title, name, *p50_ms, _number(one["p90_ms"]["total"]), _ratio(one["time_over_eager"])])
            title = ""
    return rows


def _footprint_row(result: Mapping[str, Any], name: str) -> list[str]:
    size = result["pipelines"][name]["bytes"]
    files = "" if size is None else _number(size / MIB)
    if name not in result["fresh_processes"]:
        return [name, "", "", "", "", "", files]
    p50 = result["fresh_processes"][name]["p50"]
    seconds = (p50["first_answer_ms"], p50["imported_ms"], p50["loaded_ms"] - p50["imported_ms"])
    memory = (p50["peak_bytes"], p50["imported_bytes"])
    return [name, *(f"{ms / 1e3:.2f}" for ms in seconds), *(_number(of / MIB) for of in memory), files]


def _parts(name: str, facts: Mapping[str, Any]) -> str:
    """What the files of one pipeline are, in MiB."""
    parts = facts["graph_bytes"] if facts["kind"] == "bundle" else facts["part_bytes"]
    sizes = (f"{part} {'at its hub' if size is None else _number(size / MIB)}" for part, size in parts.items())
    if facts["kind"] == "bundle":
        return f"- {name} ({facts['precision']}, language {facts['language_precision']}): {', '.join(sizes)} MiB"
    millions = (f"{part} {_number(count / 1e6)}" for part, count in facts["parameters"].items())
    return f"- {name} ({facts['precision']}): {', '.join(sizes)} MiB; {', '.join(millions)} million parameters"


def _table(titles: Sequence[str], sides: Sequence[str], rows: Rows) -> list[str]:
    """Markdown; `sides` aligns the columns after the first."""
    return ["| " + " | ".join(cells) + " |" for cells in (titles, ["---", *sides], *rows)]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _estimate(found: Mapping[str, float]) -> str:
    return f"{_percent(found['value'])} [{_percent(found['low'])}, {_percent(found['high'])}]"


def _change(found: Mapping[str, Any], metric: str) -> str:
    if "against_eager" not in found:
        return ""
    difference = found["against_eager"]["difference"][metric]
    value, low, high = (f"{100 * difference[key]:+.2f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _tokens(found: Mapping[str, Any]) -> str:
    if "against_eager" not in found:
        return ""
    tokens = found["against_eager"]["tokens"]
    return f"{tokens['equal']} of {tokens['n']}"


def _ratio(found: Mapping[str, float] | None) -> str:
    return "1" if found is None else f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def _number(value: float) -> str:
    """Three digits that count, never in powers of ten."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


if __name__ == "__main__":
    print(render(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
