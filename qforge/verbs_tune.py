"""The verb that measures: tune, without torch."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from qforge.console import Outcome
from runtime.bundle import Bundle, read_bundle
from runtime.errors import InputError
from runtime.progress import Progress
from runtime.tune import Recorded, Rows, recorded_of
from runtime.tune import tune as measure
from runtime.tuned import TUNED, Measurement, Tuned
from trainer.sources.convert import read_rows

REPEATS = 5
"""How often each recorded request is measured where there is no data set."""
WIDTH = 120


def tune(
    paths: Sequence[Path],
    max_drop: float,
    manifest: Path | None,
    task: Literal["caption", "vqa"] | None,
    limit: int | None,
) -> Outcome:
    """A table of what was measured, and what was written where."""
    bundles = [read_bundle(path) for path in dict.fromkeys(paths)]
    workload = _workload(bundles[0], manifest, task, limit)
    results = measure(bundles, workload, max_drop=max_drop, progress=Progress())
    one = next(iter(results.values()))  # the reference holds itself, so there is one
    fastest = min(results, key=lambda path: results[path].choice.ms or 0.0)
    lines = [_table(one), f"Compared with {_way(one.reference)}; at most {max_drop:g} points may be lost."]
    lines += [f"{path}: {_way(tuned.choice)}, written to {path / TUNED}" for path, tuned in results.items()]
    lines += [f"{bundle.path}: nothing held, left as it is" for bundle in bundles if bundle.path not in results]
    if len(bundles) > 1:
        lines.append(f"Fastest that held: {fastest}")
    data = {
        "measured": [row.model_dump(mode="json") for row in one.measured],
        "reference": one.reference.model_dump(mode="json"),
        "choices": {str(path): tuned.choice.model_dump(mode="json") for path, tuned in results.items()},
        "fastest": str(fastest),
        "metric": one.metric,
        "items": one.items,
        "machine": one.machine,
    }
    return Outcome(data, "\n".join(lines))


def _workload(
    bundle: Bundle, manifest: Path | None, task: Literal["caption", "vqa"] | None, limit: int | None
) -> Rows | Recorded:
    if limit is not None and limit < 1:
        raise InputError(f"--limit: expected at least 1, found {limit}")
    if manifest is None:
        for option, given in (("--task", task), ("--limit", limit)):
            if given is not None:
                raise InputError(f"{option}: expected --data beside it, found none; leave it out")
        return recorded_of(bundle, REPEATS)
    rows = read_rows(manifest)
    asked = task or ("vqa" if any(row.question is not None for row in rows) else "caption")
    return Rows(rows, asked, limit)


def _table(tuned: Tuned) -> str:
    """Fastest first, what cannot run last."""
    table = Table(title=f"{tuned.items} requests, one at a time, nothing cached; {tuned.metric}")
    for name in ("bundle", "precision", "backend", "provider"):
        table.add_column(name, overflow="fold")
    for name in ("threads", "ms", "accuracy %"):
        table.add_column(name, justify="right")
    table.add_column("held?")
    for row in sorted(tuned.measured, key=lambda row: (row.ms is None, row.ms)):
        threads = "" if row.threads is None else str(row.threads)
        figures = (f"{row.ms:.1f}", f"{100 * row.accuracy:.2f}") if row.ms and row.accuracy is not None else ("", "")
        verdict = "yes" if row.held else row.why or "no"
        provider = row.provider if row.backend == "ort" else ""
        table.add_row(row.bundle, row.precision, row.backend, provider, threads, *figures, verdict)
    text = io.StringIO()
    Console(file=text, width=WIDTH).print(table)
    return text.getvalue().rstrip()


def _way(row: Measurement) -> str:
    return f"{row.bundle} by {row.how}"
