"""What eager PyTorch computed, written down: every run of every graph's module, on the inputs that serving gives it.

The runtime's own encoder and decoder drive a `Recorder` per graph, which is an engine that runs the module. The runs
lie in a file, so they outlive the module: a large model passes through memory half by half, and one recording serves
calibration, verification of every precision, and `reference.npz`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.graphs import Arrays, Graph
from runtime.closing import Closing
from runtime.errors import CheckFailed

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Place:
    """Where an array lies in the file."""

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class ArrayFile:
    """Arrays one after another in a file; read back as views of it, not into memory."""

    def __init__(self, path: Path) -> None:
        """The file is new."""
        self._path, self._bytes = path, 0
        self._known: dict[int, tuple[Array, _Place]] = {}  # the array is held, so its id stays its own
        path.touch(exist_ok=False)

    def put(self, array: Array) -> _Place:
        """Append an array, unless it is one that was just written: what one run gives, the next is fed with."""
        if id(array) in self._known:
            return self._known[id(array)][1]
        place = _Place(self._bytes, array.dtype, array.shape)
        with self._path.open("ab") as file:
            file.write(np.ascontiguousarray(array).tobytes())
        self._bytes += array.nbytes
        self._known[id(array)] = array, place
        return place

    def forget(self, keep: Mapping[str, Array]) -> None:
        """Let go of all arrays but these, which the next run may be fed with again."""
        kept = {id(array) for array in keep.values()}
        self._known = {key: known for key, known in self._known.items() if key in kept}

    def get(self, place: _Place) -> Array:
        """The array, read-only."""
        count = int(np.prod(place.shape))
        if not count:
            return np.empty(place.shape, place.dtype)
        return np.memmap(self._path, place.dtype, mode="r", offset=place.offset, shape=place.shape)


@dataclass(frozen=True)
class Run:
    """One run of a graph's module."""

    case: str
    """prefill or step for a graph with a cache; "run" for others."""
    inputs: Arrays
    outputs: Arrays


@dataclass
class Recording:
    """The runs of one graph, in order."""

    file: ArrayFile
    _runs: list[tuple[str, dict[str, _Place], dict[str, _Place]]] = field(default_factory=list)

    def add(self, inputs: Mapping[str, Array], outputs: Arrays) -> None:
        """Write one run down."""
        places = tuple({name: self.file.put(array) for name, array in part.items()} for part in (inputs, outputs))
        self._runs.append((_case_of(inputs), places[0], places[1]))
        self.file.forget({**inputs, **outputs})

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[Run]:
        for case, inputs, outputs in self._runs:
            given, made = ({name: self.file.get(place) for name, place in part.items()} for part in (inputs, outputs))
            yield Run(case, given, made)

    def firsts(self) -> list[Run]:
        """The first run of each case."""
        found: dict[str, Run] = {}
        for run in self:
            found.setdefault(run.case, run)
        return list(found.values())


class Recorder(Closing):
    """An engine that is a graph's module, and writes its runs down."""

    def __init__(self, graph: Graph, folder: Path) -> None:
        """`folder` gets one file."""
        self._graph = graph
        self.recording = Recording(ArrayFile(folder / f"{graph.name}.runs"))

    def inputs(self) -> dict[str, tuple[int | str, ...]]:
        """Name → shape; a varying size is a name."""
        return {name: _shape(plan.example.shape, plan.varying) for name, plan in self._graph.inputs.items()}

    def outputs(self) -> dict[str, tuple[int | str, ...]]:
        """Nobody asks a module for the shapes of what it has not computed: the names alone."""
        return dict.fromkeys(self._graph.outputs, ())

    def run(self, feeds: Mapping[str, Array]) -> Arrays:
        """What PyTorch gives.

        Raises:
            CheckFailed: NaN or infinity.
        """
        outputs = self._graph.run_eager(feeds)
        require_finite(outputs, f"graph '{self._graph.name}': eager PyTorch gives", "the checkpoint is damaged")
        self.recording.add(feeds, outputs)
        return outputs

    def close(self) -> None:
        """Nothing is held open."""


def require_finite(outputs: Mapping[str, Array], who: str, why: str) -> None:
    """CheckFailed that names the output with the largest share of NaN or infinity."""
    bad = {name: 1 - float(np.isfinite(array).mean()) if array.size else 0.0 for name, array in outputs.items()}
    worst = max(bad, key=lambda name: bad[name])
    if bad[worst]:
        raise CheckFailed(f"{who} NaN or infinity in {100 * bad[worst]:.2g} % of '{worst}'; {why}")


def _case_of(inputs: Mapping[str, Array]) -> str:
    past = inputs.get("past_key_0")
    return "run" if past is None else "prefill" if past.shape[2] == 0 else "step"


def _shape(sizes: tuple[int, ...], varying: Mapping[int, str]) -> tuple[int | str, ...]:
    return tuple(varying.get(axis, size) for axis, size in enumerate(sizes))
