"""`qforge data check` for every format, and a look at some rows of a set too large to be looked through."""

from collections.abc import Callable, Iterator

import numpy as np

from runtime.dataset import Row
from runtime.dataset_check import Report, check_entries
from runtime.errors import DataError
from trainer.sources.convert import as_manifest, entries_of, left_out
from trainer.sources.rows import ManifestRows
from trainer.sources.source import Source

LOOKED_THROUGH = 65_536
"""Most rows of which a run looks at every one before it trains."""
LOOKED_AT = 2_000
"""Rows of a larger set that it looks at, evenly spaced."""


def check_source(source: Source, progress: Callable[[int, int], None] | None = None) -> Report:
    """Every row and image; raises as `runtime.dataset_check.check_manifest`."""
    return check_entries(lambda: entries_of(source), str(source.path), progress)


def look_at(source: Source) -> Report:
    """What a run does before it trains: `check_source`, or a look at 2,000 rows where there are more than 65,536."""
    rows = ManifestRows(as_manifest([source]))
    if len(rows) <= LOOKED_THROUGH:
        return check_source(source)
    count, first = left_out(rows.path)
    more = f", and {count - len(first)} more like these" if count > len(first) else ""
    report = check_entries(lambda: _some(rows), str(source.path))
    unusable = tuple(f"{problem}{more if problem is first[-1] else ''}" for problem in first)
    return Report(**{**vars(report), "problems": (*unusable, *report.problems)})


def sampled(row_count: int) -> list[int]:
    """Places of the rows that stand for all of a set; all of a small one."""
    return np.linspace(0, row_count - 1, min(row_count, LOOKED_AT)).round().astype(int).tolist()


def _some(rows: ManifestRows) -> Iterator[tuple[str, Row | DataError]]:
    for place in sampled(len(rows)):
        try:
            yield f"{rows.path}: row {place + 1}", rows[place]
        except DataError as error:
            yield f"{rows.path}: row {place + 1}", error
