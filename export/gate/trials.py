"""One bundle after another, written and measured: accuracy, size, and time beside the fp32 graphs on this machine."""

import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.gate.metric import Accuracy, Metric
from export.graphs import Arrays
from export.precision.emulate import stand_in
from export.precision.kept import Kept
from export.trace import DATA_SUFFIX, ONNX_FOLDER
from runtime.backends.ort import OrtEngine
from runtime.bundle import Bundle
from runtime.manifest import GraphEntry
from runtime.progress import Progress

Keep = Mapping[str, frozenset[str]]
"""Graph → names of the nodes that stay in higher precision."""
Write = Callable[[Keep], Mapping[str, Sequence[Kept]]]
"""Writes the graphs that it is given, with these nodes kept, and says what stayed in higher precision and why."""
WARMUP, ROUNDS, LONGEST_S = 2, 12, 4.0
"""Runs before timing; timed rounds; seconds after which the rounds end early."""


@dataclass(frozen=True)
class Candidate:
    """A bundle that was measured."""

    what: str
    """What it tries."""
    restored: dict[str, tuple[str, ...]]
    """Graph → nodes put back, in the graph's order of names."""
    accuracy: Accuracy
    bytes: int
    """Of all graphs."""
    ms: float | None
    """One row through every graph that was written in lower precision (milliseconds, sum of medians); None where a
    CPU cannot run one of them."""
    fp32_ms: float | None
    """The same through the fp32 graphs, in turn with it."""

    @property
    def nodes(self) -> int:
        """How many are restored."""
        return sum(map(len, self.restored.values()))

    def as_json(self) -> dict[str, Any]:
        """For gate.json."""
        return {
            "what": self.what,
            "nodes_restored": self.nodes,
            "restored": {graph: list(names) for graph, names in self.restored.items()},
            "accuracy": self.accuracy.as_json(),
            "bytes": self.bytes,
            "ms": self.ms,
            "fp32_ms": self.fp32_ms,
        }


class Trials:
    """Measures sets of restored nodes, each set once; remembers the best files it has written."""

    def __init__(
        self,
        folder: Path,
        state: Callable[[], Bundle],
        traced: Mapping[str, Path],
        feeds: Mapping[str, Sequence[Arrays]],
        write: Write,
        metric: Metric,
        scratch: Path,
        max_drop: float,
        progress: Progress,
    ) -> None:
        """`state` states `folder` as it is now; `traced`: the fp32 graphs that are written from."""
        self._state, self._traced, self._feeds, self._write = state, traced, feeds, write
        self._folder = folder / ONNX_FOLDER
        self._metric, self._scratch = metric, scratch
        self.max_drop, self._progress = max_drop, progress
        self._on_disk: dict[str, frozenset[str]] = {}
        self._kept: dict[str, Sequence[Kept]] = {}
        self._saved: Candidate | None = None
        self._saved_kept: dict[str, Sequence[Kept]] = {}
        self.found: dict[frozenset[tuple[str, str]], Candidate] = {}
        """Everything measured, in order."""

    def __call__(self, nodes: frozenset[tuple[str, str]], what: str) -> Candidate:
        """Write and measure the bundle with these (graph, node) restored."""
        if nodes not in self.found:
            self._bring(nodes)
            bundle = self._state()
            ms, fp32_ms = self._time(bundle)
            restored = {
                graph: tuple(sorted(node for g, node in nodes if g == graph)) for graph in sorted({g for g, _ in nodes})
            }
            accuracy = self._measure(bundle)
            candidate = Candidate(what, restored, accuracy, self._bytes(), ms, fp32_ms)
            self.found[nodes] = candidate
            self._progress.note(
                f"accuracy gate, candidate {len(self.found)}: {what}: {accuracy.drop:.2f} points lost, "
                f"{candidate.nodes} nodes restored" + ("" if self.holds(candidate) else "; too much")
            )
            if self.holds(candidate) and (self._saved is None or candidate.nodes < self._saved.nodes):
                self._save(candidate)
        return self.found[nodes]

    def holds(self, candidate: Candidate) -> bool:
        """Whether it loses no more than is allowed."""
        return candidate.accuracy.holds(self.max_drop)

    @property
    def best(self) -> Candidate | None:
        """The one that holds with the fewest nodes restored."""
        return self._saved

    def ship(self) -> Mapping[str, Sequence[Kept]]:
        """Put the best candidate's very files into the bundle; says what stayed in higher precision."""
        assert self._saved is not None
        for name in self._traced:
            copy_graph(self._scratch / "best" / f"{name}.onnx", self.file(name))
        return self._saved_kept

    def rewrite(self, graph: str, keep: frozenset[str]) -> Path:
        """Write one graph with these nodes kept; where it lies."""
        self._bring(
            frozenset((g, node) for g, names in self._on_disk.items() if g != graph for node in names)
            | {(graph, node) for node in keep}
        )
        return self.file(graph)

    def file(self, graph: str) -> Path:
        """Where a graph of the bundle lies."""
        return self._folder / f"{graph}.onnx"

    def _bring(self, nodes: frozenset[tuple[str, str]]) -> None:
        """Write the graphs whose restored nodes are others than those on disk."""
        wanted = {graph: frozenset(node for g, node in nodes if g == graph) for graph in self._traced}
        changed = {graph: names for graph, names in wanted.items() if self._on_disk.get(graph) != names}
        if changed:
            self._on_disk = {graph: names for graph, names in self._on_disk.items() if graph not in changed}
            self._kept |= self._write(changed)
            self._on_disk |= changed

    def _save(self, candidate: Candidate) -> None:
        (self._scratch / "best").mkdir(exist_ok=True)
        for name in self._traced:
            copy_graph(self.file(name), self._scratch / "best" / f"{name}.onnx")
        self._saved, self._saved_kept = candidate, dict(self._kept)

    def _bytes(self) -> int:
        return sum(file.stat().st_size for file in self._folder.iterdir())

    def _measure(self, bundle: Bundle) -> Accuracy:
        """What a CPU cannot compute as a GPU would is emulated, as in the bundle's verification."""
        emulated = self._scratch / "emulated-candidate"
        try:
            return self._metric.measure(stand_in(bundle, emulated)[0], self._progress)
        finally:
            shutil.rmtree(emulated, ignore_errors=True)

    def _time(self, bundle: Bundle) -> tuple[float, float] | tuple[None, None]:
        """Milliseconds of one row through the written graphs and through the fp32 ones, in turn."""
        if not self._traced or not all(bundle.manifest.graphs[name].on_cpu for name in self._traced):
            return None, None
        ours_ms, fp32_ms = 0.0, 0.0
        for name, traced in self._traced.items():
            feed = self._feeds[name][0]
            narrow = typed(feed, bundle.manifest.graphs[name])
            with OrtEngine(self.file(name)) as ours, OrtEngine(traced) as fp32:
                for _ in range(WARMUP):
                    ours.run(narrow)
                    fp32.run(feed)
                pairs, start = list[tuple[float, float]](), time.perf_counter()
                while not pairs or (len(pairs) < ROUNDS and time.perf_counter() - start < LONGEST_S):
                    pairs.append((_ms(ours, narrow), _ms(fp32, feed)))
            ours_ms += statistics.median(mine for mine, _ in pairs)
            fp32_ms += statistics.median(theirs for _, theirs in pairs)
        return ours_ms, fp32_ms


def _ms(engine: OrtEngine, feed: Arrays) -> float:
    start = time.perf_counter()
    engine.run(feed)
    return (time.perf_counter() - start) * 1e3


def typed(feed: Arrays, entry: GraphEntry) -> Arrays:
    """The feed in the types that a graph's inputs state: caches of an FP16 graph are FP16."""
    return {name: feed[name].astype(spec.dtype, copy=False) for name, spec in entry.inputs.items()}


def copy_graph(source: Path, target: Path) -> None:
    """A graph and the file of its weights, when it has one; an older one of the target goes."""
    for suffix in ("", DATA_SUFFIX):
        old, new = target.with_name(target.name + suffix), source.with_name(source.name + suffix)
        old.unlink(missing_ok=True)
        if new.exists():
            shutil.copyfile(new, old)
