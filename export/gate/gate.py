"""The accuracy gate: a bundle that loses more than it may is given back precision where it hurts, or is not written.

qforge export CKPT --out bundle --precision int8 --calibration train.jsonl \\
    --max-drop 0.5 --gate-data val.jsonl --gate-task vqa
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from export.config import ExportConfig, GateConfig
from export.gate.blocks import count_products
from export.gate.metric import Metric, gate_rows
from export.gate.pareto import best_of, can_plot, draw, require_plot, table
from export.gate.search import Found, search
from export.gate.sensitivity import Parts
from export.gate.trials import Trials, Write, copy_graph
from export.graphs import Arrays
from export.precision.kept import Kept
from export.retrieval_graphs import GraphSet
from runtime.answers import Request
from runtime.bundle import Bundle
from runtime.files import sha256_of
from runtime.progress import Progress
from trainer.blip2 import Blip2

REPORT, PLOT = "gate.json", "pareto.png"
"""Files of the bundle."""


@dataclass(frozen=True)
class Gate:
    """A bundle that holds its accuracy, and what was measured on the way."""

    config: GateConfig
    metric: str
    items: int
    eager: float
    """Eager's score (percent)."""
    products: int
    """MatMuls, Gemms and Convs with constant weights in the graphs of lower precision."""
    found: Found
    kept: Mapping[str, Sequence[Kept]]
    """Graph → nodes in higher precision than the rest of it."""

    def as_json(self) -> dict[str, Any]:
        """What gate.json says."""
        assert self.config.data is not None
        front = best_of(self.found.candidates)
        return {
            "max_drop": self.config.max_drop,
            "task": self.config.task,
            "metric": self.metric,
            "data": self.config.data.name,
            "items": self.items,
            "seed": self.config.seed,
            "eager": self.eager,
            "products": self.products,
            "complete": self.found.complete,
            "chosen": self.found.candidates.index(self.found.chosen),
            "candidates": [one.as_json() | {"pareto": one in front} for one in self.found.candidates],
            "blocks": [asdict(one.block) | {"error": one.error} for one in self.found.blocks],
        }


def prepare(
    model: Blip2, config: ExportConfig, graphs: GraphSet, calibrated: Sequence[Request], progress: Progress
) -> Metric | None:
    """Choose the held-out items and let eager answer them; None when no drop is limited.

    Raises:
        InputError, DataError: as `gate_rows` does. BackendUnavailable: the plot is asked for, without matplotlib.
    """
    gate = config.gate
    if gate.max_drop is None:
        return None
    hashes = {sha256_of(Path(str(request.image))) for request in calibrated}
    rows = gate_rows(gate, hashes, bool(graphs.answering), bool(graphs.searching))
    if gate.plot:
        require_plot()
    assert gate.task is not None
    return Metric(model, rows, gate.task, config.max_batch, gate.seed, progress)


def hold(
    metric: Metric,
    config: GateConfig,
    *,
    folder: Path,
    state: Callable[[], Bundle],
    traced: Mapping[str, Path],
    feeds: Mapping[str, Sequence[Arrays]],
    write: Write,
    scratch: Path,
    progress: Progress,
) -> Gate:
    """Bring the graphs of the bundle to the smallest set of nodes in higher precision that holds.

    Args:
        metric: What `prepare` gave.
        config: Settings whose `max_drop` is set.
        folder: The bundle's.
        state: States the folder as the bundle that it is now.
        traced: The fp32 graphs that are written in lower precision.
        feeds: Real inputs of each of them.
        write: Writes graphs of the bundle with nodes kept.
        scratch: Folder for copies of graphs.
        progress: Where bars are shown.

    Raises:
        CheckFailed: it does not hold even with everything restored; names the worst blocks.
    """
    assert config.max_drop is not None
    trials = Trials(folder, state, traced, feeds, write, metric, scratch, config.max_drop, progress)
    plain = {name: scratch / "plain" / f"{name}.onnx" for name in traced}

    def copy_plain() -> None:
        (scratch / "plain").mkdir()
        for name, file in plain.items():
            copy_graph(trials.file(name), file)

    parts = Parts(traced, plain, feeds, trials.rewrite)
    found = search(trials, parts, most=config.candidates, copy_plain=copy_plain, progress=progress)
    if not found.complete:
        progress.note(
            f"accuracy gate: the search ended after {len(found.candidates)} candidates (export.gate.candidates); "
            f"fewer restored nodes may do"
        )
    kept = trials.ship()
    products = count_products([onnx.load(str(file), load_external_data=False) for file in traced.values()])
    return Gate(config, metric.name, metric.items, metric.eager, products, found, kept)


def plot(gate: Gate, folder: Path, progress: Progress) -> None:
    """Draw the candidates into the bundle, as the settings ask: always, never, or where matplotlib is installed."""
    assert gate.config.max_drop is not None
    if gate.config.plot is None and not can_plot():
        progress.note(f"{PLOT} is left out: matplotlib is not installed (pip install 'qforge[bench]')")
    elif gate.config.plot is not False:
        draw(gate.found.candidates, gate.found.chosen, gate.config.max_drop, gate.metric, folder / PLOT)


def story(gate: Gate) -> str:
    """The gate's part of the bundle's card, Markdown."""
    config, found = gate.config, gate.found
    assert config.max_drop is not None
    at, restored = found.chosen.accuracy, found.chosen.nodes
    parts = [
        f"`{config.task}` on {gate.items} held-out items: {gate.metric} {at.score:.2f} %, eager PyTorch "
        f"{gate.eager:.2f} %. Points lost: {at.drop:.2f} (95 % interval {at.low:.2f} to {at.high:.2f}), "
        f"{config.max_drop:g} may be.",
        f"{restored} of {gate.products} matrix products are back in higher precision"
        + (":" if restored else "; it holds as it was written."),
        "\n".join(
            f"- {name}: {', '.join(f'`{node}`' for node in nodes)}" for name, nodes in found.chosen.restored.items()
        ),
        ""
        if found.complete
        else f"The search ended after {len(found.candidates)} candidates; fewer restored nodes may do.",
        table(found.candidates, found.chosen, config.max_drop),
    ]
    return "\n\n".join(filter(None, parts))
