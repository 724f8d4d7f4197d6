"""An engine that judges another: a graph and its PyTorch module compute on the same arrays, the distance is measured.

Because it keeps the engine contract, the runtime's own encoder and decoder can drive it, so each graph is judged on
exactly the inputs that serving gives it. It hands on PyTorch's result: no graph is blamed for an earlier one.

Shape letters: B batch, L past + new positions, h heads, d head width
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from export.config import Tolerance
from export.eager import require_finite
from export.facts import precision_of
from export.graphs import Arrays, Graph
from runtime.backends import Device, Engine
from runtime.backends.host import HostEngine
from runtime.bundle import Bundle
from runtime.checks import relative_error
from runtime.closing import Closing
from runtime.manifest import TensorSpec
from runtime.precision import FLOATING, LanguagePrecision, Precision
from runtime.reference import GraphCase

LARGEST_PENDING_BYTES = 1 << 30
"""Of runs that wait for their graph's turn."""


@dataclass
class Parity:
    """How far one output of one graph was from eager, at worst."""

    graph: str
    case: str
    output: str
    precision: Precision | LanguagePrecision
    allowed_error: float
    allowed_cosine: float
    max_error: float = 0.0
    """Largest error as a fraction of eager's largest value."""
    cosine: float = 1.0
    """Smallest cosine."""
    runs: int = 0

    @property
    def ok(self) -> bool:
        """Whether both are within their tolerances."""
        return self.max_error <= self.allowed_error and self.cosine >= self.allowed_cosine


class JudgingDevice:
    """Where graphs are judged: on the CPU, in floating point with their weights mapped, so that any size fits.

    Packed and mapped weights are multiplied alike; quantised ones have kernels of their own when they are packed, and
    are judged as they are served.
    """

    in_place = False
    """See `Opener`."""

    def open(self, bundle: Bundle, graph_name: str) -> Engine:
        """One graph of a bundle; raises as `Device.open`."""
        return Device(mapped=precision_of(bundle.manifest, graph_name) in FLOATING).open(bundle, graph_name)


JUDGING = JudgingDevice()


class Judge(Closing, HostEngine):
    """An engine that is a graph's module; what it computed, the graph computes again, and the two are compared.

    The graph's turn comes at `settle`: a large module and its graph have no room in memory side by side, and taking
    turns at every run would read both from disk each time.
    """

    def __init__(
        self,
        graph: Graph,
        engine: Engine,
        outputs: Mapping[str, TensorSpec],
        precision: Precision | LanguagePrecision,
        tolerance: Tolerance,
    ) -> None:
        """`outputs` are the graph's in the manifest: what is handed on has their types."""
        self._graph, self._engine = graph, engine
        self._types = {name: np.dtype(spec.dtype) for name, spec in outputs.items()}
        self._precision, self._tolerance = precision, tolerance
        self._pending = list[tuple[Arrays, Arrays]]()
        self._pending_bytes = 0
        self.parities: dict[tuple[str, str], Parity] = {}
        """By case and output."""
        self.cases: dict[str, GraphCase] = {}
        """The first run of each case."""

    def inputs(self) -> dict[str, tuple[int | str, ...]]:
        """Those of the graph."""
        return self._engine.inputs()

    def outputs(self) -> dict[str, tuple[int | str, ...]]:
        """Those of the graph."""
        return self._engine.outputs()

    def compute(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """PyTorch's outputs, in the graph's types; the graph's are compared with them later.

        Raises:
            CheckFailed: NaN or infinity.
        """
        wide = {name: array.astype(np.float32) if array.dtype == np.float16 else array for name, array in feeds.items()}
        expected = self._graph.run_eager(wide)
        require_finite(expected, f"graph '{self._graph.name}': eager PyTorch gives", "the checkpoint is damaged")
        kept = {name: array.copy() for name, array in feeds.items()}  # a decoder writes its caches again
        self._pending.append((kept, expected))
        self._pending_bytes += sum(array.nbytes for array in (*feeds.values(), *expected.values()))
        if self._pending_bytes > LARGEST_PENDING_BYTES:
            self.settle()
        return {name: array.astype(self._types[name], copy=False) for name, array in expected.items()}

    def settle(self) -> None:
        """Let the graph compute all that is pending, and compare; CheckFailed: NaN or infinity."""
        for feeds, expected in self._pending:
            found = self._engine.run(feeds)
            named = f"graph '{self._graph.name}'"
            require_finite(found, f"{named}: the {self._precision} graph gives", "eager PyTorch does not")
            case = self._case(feeds)
            for name in expected:
                self._compare(case, name, *(self._seen(side[name], name, feeds) for side in (expected, found)))
            if case not in self.cases:
                self.cases[case] = self._recorded(case, feeds, expected)
        self._pending.clear()
        self._pending_bytes = 0

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()

    def _case(self, feeds: Mapping[str, npt.NDArray[Any]]) -> str:
        """As `_case_of`; a graph for several image sizes has a case of each."""
        pixels = self._graph.inputs.get("pixels")
        return f"{feeds['pixels'].shape[2]}px" if pixels is not None and 2 in pixels.varying else _case_of(feeds)

    def _compare(self, case: str, name: str, expected: npt.NDArray[Any], found: npt.NDArray[Any]) -> None:
        allowed = self._tolerance
        fresh = Parity(self._graph.name, case, name, self._precision, allowed.max_error, allowed.min_cosine)
        parity = self.parities.setdefault((case, name), fresh)
        parity.max_error = max(parity.max_error, relative_error(found, expected))
        parity.cosine = min(parity.cosine, cosine(found, expected))
        parity.runs += 1

    def _seen(self, array: npt.NDArray[Any], name: str, feeds: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """Cache positions that the mask hides count as 0: their content depends on how an engine treats empty rows."""
        if name not in self._graph.hidden:
            return array
        seen_BhLd: npt.NDArray[Any] = array * feeds["attention_mask"][:, None, :, None]
        return seen_BhLd

    def _recorded(self, case: str, feeds: Mapping[str, npt.NDArray[Any]], expected: Arrays) -> GraphCase:
        """Without outputs at hidden positions, which nobody reads and no two engines agree on."""
        hidden = self._graph.hidden if case == "prefill" and not feeds["attention_mask"].all() else frozenset[str]()
        kept = {name: array for name, array in expected.items() if name not in hidden}
        return GraphCase(self._graph.name, case, dict(feeds), kept, dict.fromkeys(kept, self._tolerance.max_error))


def settle(judges: Iterable[Judge]) -> None:
    """Let every graph compute what its module has; CheckFailed: NaN or infinity."""
    for judge in judges:
        judge.settle()


def _case_of(feeds: Mapping[str, npt.NDArray[Any]]) -> str:
    """prefill or step for a graph with a cache; the others have one case."""
    past = feeds.get("past_key_0")
    return "run" if past is None else "prefill" if past.shape[2] == 0 else "step"


def cosine(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Of two arrays of one shape; 1 for two of zeros, 0 where only one is."""
    a, b = found.ravel().astype(np.float64), expected.ravel().astype(np.float64)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms else float(np.array_equal(a, b))
