"""How long each graph takes on the machine that exports: a first figure for the card, not a benchmark.

Every graph runs on the inputs recorded at verification, at one row and at the bundle's largest batch. The figures are
this machine's, so they lie in a file that the manifest does not list: two exports of one checkpoint stay equal.
"""

import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from export.facts import precision_of, versions
from export.graphs import Arrays
from runtime.backends import CPU, Engine
from runtime.bundle import LATENCY, Bundle
from runtime.cores import physical_cores
from runtime.files import write_json_atomic
from runtime.manifest import GraphEntry, Manifest
from runtime.progress import Progress
from runtime.reference import GraphCase

RUNS = 5
"""Timed runs, after one that is not."""
LONGEST_S = 2.0
"""No further run is begun after this; a large graph gets fewer."""


@dataclass(frozen=True)
class Timing:
    """One graph at one batch size."""

    graph: str
    case: str
    rows: int
    median_ms: float
    runs: int


def time_graphs(bundle: Bundle, cases: Sequence[GraphCase], progress: Progress) -> list[Timing]:
    """Median time of every recorded case at one row and at the largest batch, with ONNX Runtime on all CPU cores.

    Graphs that no CPU can run have no time.
    """
    timings, sizes = list[Timing](), sorted({1, bundle.manifest.limits.max_batch})
    cases = [case for case in cases if bundle.manifest.graphs[case.graph].on_cpu]
    with progress.bar("timing", len(cases)) as bar:
        for case in cases:
            with CPU.open(bundle, case.graph) as engine:
                for rows in sizes:
                    feeds = _rows(case, rows, bundle.manifest.graphs[case.graph])
                    timings.append(_time(engine, case, rows, feeds))
            bar.advance()
    return timings


def write_latency(folder: Path, timings: Sequence[Timing]) -> None:
    """`latency.json`: the figures, and what they were measured on."""
    machine = {"machine": platform.machine(), "cpu_cores": physical_cores(), "onnxruntime": versions()["onnxruntime"]}
    record = {"measured_on": machine, "provider": CPU.provider, "timings": [asdict(timing) for timing in timings]}
    write_json_atomic(folder / LATENCY, record)


def read_latency(folder: Path) -> list[Timing]:
    """The figures of a bundle; none when it has no such file."""
    file = folder / LATENCY
    if not file.is_file():
        return []
    return [Timing(**timing) for timing in json.loads(file.read_text(encoding="utf-8"))["timings"]]


def table(manifest: Manifest, timings: Sequence[Timing]) -> str:
    """Size and latency of every graph, as Markdown; the terminal shows the same lines."""
    sizes = sorted({timing.rows for timing in timings})
    titles = [f"batch {rows} (ms)" for rows in sizes]
    lines = ["| " + " | ".join(["graph", "precision", "MiB", "case", *titles]) + " |", "|---" * (4 + len(sizes)) + "|"]
    total = 0
    for name, entry in manifest.graphs.items():
        size_bytes = entry.bytes + (entry.data.bytes if entry.data else 0)
        total += size_bytes
        cases = dict.fromkeys(timing.case for timing in timings if timing.graph == name) or {"": None}
        for case in cases:
            of_case = {timing.rows: timing for timing in timings if (timing.graph, timing.case) == (name, case)}
            shown = [f"{of_case[rows].median_ms:.2f}" if rows in of_case else "" for rows in sizes]
            cells = [name, precision_of(manifest, name), f"{size_bytes / 2**20:.2f}", case, *shown]
            lines.append("| " + " | ".join(cells) + " |")
    lines.append("| " + " | ".join(["all", "", f"{total / 2**20:.2f}", "", *[""] * len(sizes)]) + " |")
    return "\n".join(lines)


def _time(engine: Engine, case: GraphCase, rows: int, feeds: Arrays) -> Timing:
    engine.run(feeds)
    taken_s, begun_s = list[float](), time.perf_counter()
    while len(taken_s) < RUNS and (not taken_s or time.perf_counter() - begun_s < LONGEST_S):
        start_s = time.perf_counter()
        engine.run(feeds)
        taken_s.append(time.perf_counter() - start_s)
    return Timing(case.graph, case.case, rows, statistics.median(taken_s) * 1e3, len(taken_s))


def _rows(case: GraphCase, rows: int, entry: GraphEntry) -> Arrays:
    """The recorded rows, repeated or cut to `rows` along the batch axis of every input that has one."""
    batched = {name for name, spec in entry.inputs.items() if spec.shape and isinstance(spec.shape[0], str)}
    return {
        name: np.ascontiguousarray(np.resize(array, (rows, *array.shape[1:]))) if name in batched else array
        for name, array in case.inputs.items()
    }
