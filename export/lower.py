"""From traced fp32 graphs to those of the bundle: real inputs, writing, and accuracy held where a drop is limited."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.calibrate import feeds_of
from export.config import ExportConfig
from export.gate.gate import Gate, hold
from export.gate.metric import Metric
from export.graphs import Arrays
from export.language_feeds import language_feeds
from export.precision.kept import Kept
from export.precision.plan import Writer, write_precision
from export.retrieval_graphs import GraphSet
from export.retrieval_verify import Pair
from export.trace import ONNX_FOLDER
from runtime.answers import Request
from runtime.bundle import Bundle
from runtime.progress import Progress
from runtime.speaker import LANGUAGE_GRAPHS
from trainer.blip2 import Blip2


@dataclass(frozen=True)
class Lowered:
    """What became of the graphs."""

    kept: Mapping[str, Sequence[Kept]]
    """Graph → nodes in higher precision than the rest of it."""
    feeds: Mapping[str, Sequence[Arrays]]
    """Graph → real inputs it was written with."""
    gate: Gate | None
    """None when no drop is limited."""


def lower(
    exact: Bundle,
    folder: Path,
    model: Blip2,
    graphs: GraphSet,
    writers: Mapping[str, Writer],
    requests: Sequence[Request],
    pairs: Sequence[Pair],
    *,
    config: ExportConfig,
    metric: Metric | None,
    state: Callable[[], Bundle],
    scratch: Path,
    progress: Progress,
) -> Lowered:
    """Write every graph of the bundle in `folder`.

    Args:
        exact: The same bundle in fp32; its graphs are what is written from.
        folder: Bundle folder, complete but for the graphs.
        model: What was traced.
        graphs: The bundle's.
        writers: How each graph gets its precision.
        requests: Real requests that inputs of graphs are made of.
        pairs: Real pairs, for the graphs that search.
        config: Settings.
        metric: What accuracy is measured with; None when no drop is limited.
        state: States `folder` as a bundle.
        scratch: Folder for inputs and copies; its content is the caller's to remove.
        progress: Where bars are shown.

    Raises:
        CheckFailed: accuracy does not hold even with everything restored, or a graph is not valid.
    """
    narrow = {name for name, writer in writers.items() if writer.precision != "fp32"}
    measured = {name for name in narrow if metric is not None or writers[name].needs_feeds}
    feeds: dict[str, Sequence[Arrays]] = {**feeds_of(model, graphs, measured, requests, pairs, scratch / "feeds")}
    if measured & set(LANGUAGE_GRAPHS[exact.manifest.model.style]):
        feeds |= language_feeds(exact, model, graphs.answering, requests, scratch / "runs")

    def write(keep: Mapping[str, frozenset[str]]) -> dict[str, list[Kept]]:
        chosen = {name: writer for name, writer in writers.items() if name in keep}
        return write_precision(folder, exact.path, chosen, feeds, keep, progress)

    held: Gate | None = None
    at_once = [name for name in writers if metric is None or name not in narrow]
    kept: dict[str, Sequence[Kept]] = {**write(dict.fromkeys(at_once, frozenset()))}
    if metric is not None:
        held = hold(
            metric,
            config.gate,
            folder=folder,
            state=state,
            traced={name: exact.graph(name) for name in writers if name in narrow},
            feeds=feeds,
            write=write,
            scratch=scratch,
            progress=progress,
        )
        kept |= held.kept
    for name, writer in writers.items():
        if writer.finish is not None:
            writer.finish(folder / ONNX_FOLDER / f"{name}.onnx")
    return Lowered({name: kept[name] for name in writers}, feeds, held)
