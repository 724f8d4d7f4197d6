"""The first page of `OUT/report/report.md`: what was reached, how to try it, how long it took."""

import json
from collections.abc import Sequence
from pathlib import Path

from qforge.steps import read_records

CURVES = "training.png"
"""Picture of the training curves, in the report and in every checkpoint."""


def report_text(measured: str, bundles: Sequence[Path], checkpoints: Sequence[Path], out: Path) -> str:
    """Markdown; `measured` is the benchmark's own report, `checkpoints` are those of the stages."""
    records = read_records(out)
    total_s = sum(record["seconds"] for record in records.values())
    lines = [
        "# What this run made",
        "",
        f"Recipe: `{out}/recipe.yaml` (resolved). Model: `{out}/checkpoint`. Bundles:",
        ", ".join(f"`{bundle}`" for bundle in bundles) + ".",
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
        "## Training",
        "",
        f"![losses between chance and floor, held-out metrics, rates and gradients of every stage]({CURVES})",
        "",
        *_alarms(checkpoints),
        "",
        "## Time of each step",
        "",
        "| step | seconds |",
        "|---|---:|",
        *(f"| {name} | {record['seconds']:.1f} |" for name, record in records.items()),
        f"| all | {total_s:.1f} |",
    ]
    return "\n".join(lines) + "\n"


def _alarms(checkpoints: Sequence[Path]) -> list[str]:
    """One line per alarm that training raised."""
    found = []
    for checkpoint in checkpoints:
        metrics = json.loads((checkpoint / "metrics.json").read_text(encoding="utf-8"))
        found += [f"- {metrics['stage']}, step {alarm['step']}: {alarm['text']}." for alarm in metrics["alarms"]]
    return ["Alarms:", "", *found] if found else ["No curve raised an alarm."]
