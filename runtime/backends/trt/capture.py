"""CUDA graphs: a run that comes again with the same shapes and addresses is launched as one piece of work.

A captured graph has its shapes, addresses and context frozen in it. So a graph is known by profile, shapes and
addresses, and has an execution context of its own; what moves makes it worthless. A first run with new shapes is never
captured, because TensorRT finishes its preparations in it; nor is a run that comes only once worth it.

A graph that was captured under another device than the plan's is empty: its replay changes nothing and says nothing.
So every graph is proved before it is used: it has work in it, and over spoilt outputs it gives what the plain run gave.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.backends.trt.cuda import Cuda
from runtime.backends.trt.elements import bytes_of, unpacked
from runtime.backends.trt.plan import Context
from runtime.backends.trt.session import Session

MOST = 8
"""Graphs of an engine: each holds a context. What comes later runs plainly, unless one of them is idle: a cache that
grows by a position a step has new shapes at every step, and would otherwise be captured anew for ever."""
IDLE = 512
"""Runs after which a graph that was in none of them gives its place up: its memory may be gone for good."""
REMEMBERED = 64
"""Runs remembered that came once."""
SPOIL = 0xFF
"""Byte that outputs are filled with before the proof: NaN as floats, -1 as integers."""
SAME = 1e-3
"""Largest difference from the plain run, as a fraction of its largest value: sums may be taken in another order."""


@dataclass(frozen=True)
class Key:
    """What a graph has frozen in it; tensors in the order of their names."""

    profile: int
    shapes: tuple[tuple[int, ...], ...]
    addresses: tuple[int, ...]


@dataclass(frozen=True)
class Output:
    """An output that a proof looks at."""

    address: int
    shape: tuple[int, ...]
    dtype: str


@dataclass
class Counts:
    """How an engine's runs were made."""

    eager: int = 0
    """Enqueued kernel by kernel."""
    replays: int = 0
    """Launched as a graph."""
    captures: int = 0
    """Graphs made and proved."""
    unfit: int = 0
    """Times a graph was not possible, or did not prove right."""


@dataclass
class _Ready:
    graph: int
    context: Context
    """Kept alive: the graph runs in it."""
    used: int
    """The engine's run that used it last."""


class Graphs:
    """The captured graphs of one engine."""

    def __init__(self, session: Session, name: str) -> None:
        """`name` is the graph's, for warnings."""
        self._session, self._name = session, name
        self._cuda: Cuda = session.cuda
        self._ready = dict[Key, _Ready]()
        self._seen: OrderedDict[Key, None] = OrderedDict()
        self._possible, self._runs = True, 0
        self.counts = Counts()

    def run(
        self,
        key: Key,
        eager: Callable[[], None],
        prepared: Callable[[], Context],
        outputs: Mapping[str, Output],
    ) -> None:
        """One run: a launch, or `eager`, or a capture in the context that `prepared` makes.

        `outputs` are those that a run writes anew; a cache that is updated in place is none, and stays as it is.
        """
        self._runs += 1
        if (ready := self._ready.get(key)) is not None:
            ready.used = self._runs
            self._cuda.launch(ready.graph, self._session.stream)
            self.counts.replays += 1
            return
        if key in self._seen and self._possible and self._has_room():
            self._capture(key, prepared(), outputs)
            return
        eager()
        self.counts.eager += 1
        self._seen[key] = None
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)

    def drop(self) -> None:
        """Forget all graphs: memory that they know has moved."""
        while self._ready:
            self._end(self._ready.popitem()[1])
        self._seen.clear()

    def _capture(self, key: Key, context: Context, outputs: Mapping[str, Output]) -> None:
        stream = self._session.stream
        context.enqueue(stream)  # this run's answer, and the preparations that must not be captured
        self._cuda.synchronize(stream)
        self.counts.eager += 1
        if not context.capturable(stream):
            self._unfit("TensorRT says that it cannot be captured")
            return
        expected = self._read(outputs)
        captured = self._cuda.capture(stream, lambda: context.enqueue(stream))
        nodes = self._cuda.nodes(captured)
        ready = _Ready(self._cuda.instantiate(captured), context, self._runs)
        for output in outputs.values():
            self._cuda.fill(output.address, SPOIL, bytes_of(output.shape, output.dtype), stream)
        if nodes:
            self._cuda.launch(ready.graph, stream)
        self._cuda.synchronize(stream)
        wrong = [name for name, found in self._read(outputs).items() if not _same(found, expected[name])]
        if wrong or not nodes:
            self._end(ready)
            context.enqueue(stream)
            self.counts.eager += 1
            self._unfit(f"its replay gives another '{wrong[0]}'" if nodes else "the capture is empty")
            return
        self.counts.captures += 1
        self._ready[key] = ready

    def _has_room(self) -> bool:
        """Whether one more graph may be kept; an idle one makes room."""
        if len(self._ready) < MOST:
            return True
        oldest = min(self._ready, key=lambda key: self._ready[key].used)
        if self._runs - self._ready[oldest].used <= IDLE:
            return False
        self._end(self._ready.pop(oldest))
        return True

    def _read(self, outputs: Mapping[str, Output]) -> dict[str, npt.NDArray[np.generic]]:
        return {
            name: unpacked(self._session.read(one.address, bytes_of(one.shape, one.dtype)), one.shape, one.dtype)
            for name, one in outputs.items()
        }

    def _end(self, ready: _Ready) -> None:
        self._cuda.synchronize(self._session.stream)
        self._cuda.end_graph(ready.graph)

    def _unfit(self, why: str) -> None:
        """Plain runs from now on; slower and right, and said once."""
        self.counts.unfit += 1
        self._possible = False
        warnings.warn(
            f"graph '{self._name}' runs without a CUDA graph: {why}; answers are right, and slower", stacklevel=2
        )


def _same(found: npt.NDArray[np.generic], expected: npt.NDArray[np.generic]) -> bool:
    """Whether a replay gave what the plain run gave; NaN where that gave NaN."""
    if not np.issubdtype(expected.dtype, np.floating):
        return np.array_equal(found, expected)
    wanted, got = expected.astype(np.float64), found.astype(np.float64)
    scale = float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0))
    return np.allclose(got, wanted, rtol=0.0, atol=SAME * (scale or 1.0), equal_nan=True)
