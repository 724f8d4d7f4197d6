"""The first page of `OUT/report/report.md`: what was reached, how to try it, how long it took."""

from collections.abc import Sequence
from pathlib import Path

from qforge.steps import read_records


def report_text(measured: str, bundles: Sequence[Path], out: Path) -> str:
    """Markdown; `measured` is the benchmark's own report, which follows below."""
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
        "## Time of each step",
        "",
        "| step | seconds |",
        "|---|---:|",
        *(f"| {name} | {record['seconds']:.1f} |" for name, record in records.items()),
        f"| all | {total_s:.1f} |",
    ]
    return "\n".join(lines) + "\n"
