"""A graph's PyTorch module as an engine: the runtime's own encoder and decoder drive it on the inputs of serving."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from export.feeds import StoredFeeds
from export.graphs import Arrays, Graph
from runtime.backends.host import HostEngine
from runtime.closing import Closing
from runtime.errors import CheckFailed


class Eager(Closing, HostEngine):
    """PyTorch computes the graph; satisfies `runtime.backends.Engine`."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def inputs(self) -> dict[str, tuple[int | str, ...]]:
        """As in the graph's table."""
        return {
            name: tuple(plan.varying.get(axis, size) for axis, size in enumerate(plan.example.shape))
            for name, plan in self._graph.inputs.items()
        }

    def outputs(self) -> dict[str, tuple[int | str, ...]]:
        """Names alone: the table does not say the fixed sizes of an output."""
        return dict.fromkeys(self._graph.outputs, ())

    def compute(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """PyTorch's outputs.

        Raises:
            CheckFailed: NaN or infinity.
        """
        outputs = self._graph.run_eager(feeds)
        require_finite(outputs, f"graph '{self._graph.name}': eager PyTorch gives", "the checkpoint is damaged")
        return outputs

    def close(self) -> None:
        """Nothing is held."""


class Recorder(Eager):
    """Keeps what it was run with."""

    def __init__(self, graph: Graph, feeds: StoredFeeds) -> None:
        """Every run is appended to `feeds`."""
        super().__init__(graph)
        self._feeds = feeds

    def compute(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """PyTorch's outputs."""
        outputs = super().compute(feeds)
        self._feeds.append(dict(feeds))
        return outputs


def require_finite(outputs: Mapping[str, npt.NDArray[Any]], who: str, why: str) -> None:
    """CheckFailed that names the output with the largest share of NaN or infinity; `who` gives them."""
    worst, share = least_finite(outputs)
    if share:
        raise CheckFailed(f"{who} NaN or infinity in {100 * share:.2g} % of '{worst}'; {why}")


def least_finite(outputs: Mapping[str, npt.NDArray[Any]]) -> tuple[str, float]:
    """The output with the largest share of NaN or infinity, and that share: 0 where all is well."""
    bad = {name: 1 - float(np.isfinite(array).mean()) if array.size else 0.0 for name, array in outputs.items()}
    worst = max(bad, key=lambda name: bad[name])
    return worst, bad[worst]
