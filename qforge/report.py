"""The first page of `OUT/report/report.md`: what was reached, how to try it, how long it took."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qforge.steps import read_records


def report_text(scores: Mapping[str, Any], measured: str, bundles: Sequence[Path], out: Path) -> str:
    """Markdown; `scores` is evaluation.json, `measured` the benchmark's own report, which follows below."""
    rows = [
        (f"{task}: {name.replace('_', ' ')}", value, scored["n"])
        for task, scored in scores.items()
        for name, value in scored["metrics"].items()
    ]
    records = read_records(out)
    total_s = sum(record["seconds"] for record in records.values())
    lines = [
        "# What this run made",
        "",
        f"Recipe: `{out}/recipe.yaml` (resolved). Model: `{out}/checkpoint`. Bundles:",
        ", ".join(f"`{bundle}`" for bundle in bundles) + ".",
        "",
        "## The checkpoint on the test split (eager PyTorch)",
        "",
        "| what | score | items |",
        "|---|---:|---:|",
        *(f"| {name} | {100 * value:.1f} % | {n} |" for name, value, n in rows),
        "",
        "## Try it",
        "",
        "```bash",
        f'qforge vqa {bundles[-1]} PICTURE "what colour is the circle?"',
        f"qforge caption {bundles[-1]} PICTURE",
        "```",
        "",
        measured.strip(),
        "",
        "## Time of each step",
        "",
        "| step | seconds |",
        "|---|---:|",
        *(f"| {name} | {record['seconds']:.1f} |" for name, record in records.items()),
        f"| all | {total_s:.1f} |",
    ]
    return "\n".join(lines) + "\n"
