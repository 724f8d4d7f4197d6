"""The engine contract, and the one place that picks a backend.

One small file per backend; a backend is imported only when it is asked for. The same contract test
(tests/runtime/test_backends.py) runs against every backend present. Where graphs run is one value, `Device`: the
command line makes it and the engines read it, so nothing in between lists its parts.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy.typing as npt

from runtime.bundle import Bundle
from runtime.errors import BackendUnavailable, InputError
from runtime.provider import Provider
from runtime.user_cache import user_cache

if TYPE_CHECKING:
    from runtime.first_use import Place

Arrays = dict[str, npt.NDArray[Any]]
"""Named arrays, as an engine returns them."""

BACKENDS = ("ort", "openvino", "trt")
"""ONNX Runtime on one of its providers; OpenVINO on the CPU for what looks at an image, beside ONNX Runtime for the
language model; plans of TensorRT or TensorRT-RTX on an NVIDIA GPU."""


STEPPED = frozenset({"language", "decoder"})
"""Graphs that run once a token."""
SPEAKING = frozenset({"embed", "encoder", *STEPPED})
"""Graphs of the language model; all others look at an image, or match one with a text."""


class View(Protocol):
    """The first elements of a buffer as a contiguous array; whoever views the same buffer sees what is written here."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""
        ...

    @property
    def dtype(self) -> str:
        """numpy's name of the element type; bfloat16, which numpy has not, is read and written as float32."""
        ...

    def numpy(self) -> npt.NDArray[Any]:
        """Its elements in host memory: on a CPU these very ones, elsewhere a copy."""
        ...

    def assign(self, array: npt.NDArray[Any]) -> None:
        """Write an array of the same shape and kind of number there; ValueError for another shape."""
        ...

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy whole rows of its first axis inside it, one pair (target, source) after the other."""
        ...


class Buffer(Protocol):
    """Memory where an engine computes; it lives as long as one of its views."""

    def view(self, shape: tuple[int, ...]) -> View:
        """Its first elements as an array of this shape; ValueError when it has not so many."""
        ...


Feeds = Mapping[str, "npt.NDArray[Any] | View"]
"""Named inputs of a graph: arrays of the host, and memory of the engine."""


class Engine(Protocol):
    """One compiled graph: named arrays in, named arrays out."""

    def inputs(self) -> dict[str, tuple[int | str, ...]]:
        """Name → shape of every input; a varying size is a name."""
        ...

    def outputs(self) -> dict[str, tuple[int | str, ...]]:
        """Name → shape of every output; a varying size is a name."""
        ...

    def buffer(self, elements: int, dtype: str) -> Buffer:
        """Memory for so many elements, where this engine computes; its content is undefined at first."""
        ...

    def run(self, feeds: Feeds, into: Mapping[str, View] | None = None) -> Arrays:
        """All outputs for all inputs; those named in `into` are written there, the others belong to the caller.

        Views are of this engine's buffers; one that is written shares its buffer with none that is read. Threads may
        run one engine at once, each with views of its own.
        """
        ...

    def close(self) -> None:
        """Free the graph; the engine cannot run afterwards."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Opener(Protocol):
    """Where graphs run: a `Device` here, or another server (Triton) that holds them."""

    @property
    def in_place(self) -> bool:
        """Whether its engines update a cache where it lies, so that one of fixed size is the faster."""
        ...

    def open(self, bundle: Bundle, graph_name: str) -> Engine:
        """One graph of a bundle, ready to run."""
        ...


@dataclass(frozen=True)
class Device:
    """Where the graphs of a bundle run on this machine."""

    backend: str = "ort"
    """Library that runs them; see `available_backends`."""
    provider: Provider = "cpu"
    """What computes under it; see `runtime.backends.providers`."""
    threads: int | None = None
    """CPU threads per graph; None takes the physical cores this process may use."""
    mapped: bool = False
    """On the CPU: weights stay in their file and are read as they are used; slower, and a graph may exceed memory."""
    checked: bool = True
    """Off the CPU: a graph is asked what the bundle recorded before its first answer here; see `runtime.first_use`."""

    @property
    def in_place(self) -> bool:
        """See `Opener`."""
        return self.backend == "trt"

    def open(self, bundle: Bundle, graph_name: str) -> Engine:
        """Open one graph of a bundle.

        Raises:
            InputError: no such backend or provider, fewer than one thread, or a setting that the backend has not.
            BackendUnavailable: the package of the backend or provider is not installed, the provider cannot start, it
                cannot compute in the graph's type, or there is no GPU for backend 'trt'.
            BundleError: the bundle has no such graph or no plan of it for this GPU, or the provider cannot run it
                whole.
            CheckFailed: on its first use here it did not give what the bundle recorded.
        """
        if self.backend not in BACKENDS:
            raise InputError(f"backend: expected one of {', '.join(BACKENDS)}, found {self.backend!r}")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads: expected at least 1, found {self.threads}")
        if self.backend == "trt":
            return self._open_plan(bundle, graph_name)
        model, manifest = bundle.graph(graph_name), bundle.manifest
        if self.provider == "cpu" and not manifest.graphs[graph_name].on_cpu:
            raise BackendUnavailable(
                f"{bundle.path}: graph '{graph_name}' computes in BF16, which backend '{self.backend}' cannot do on a "
                f"CPU; build an engine for a GPU (qforge build {bundle.path}), or export with --precision fp16 or fp32"
            )
        if self.backend == "openvino":
            if self.provider != "cpu" or self.mapped:
                raise InputError(
                    "provider, mapped: backend 'openvino' computes on the CPU and has neither; leave them out"
                )
            if graph_name not in SPEAKING:
                return self._open_compiled(bundle, graph_name, model)
        from runtime.backends.ort import OrtEngine, place_of  # its door: onnxruntime loads only when it is used
        from runtime.prepared import prepared_graph

        on_cpu = self.provider == "cpu"
        prepared = prepared_graph(bundle, graph_name) if on_cpu and not self.mapped else None
        engine = OrtEngine(
            prepared or model,
            self.provider,
            self.threads,
            fuse_int8=manifest.fuses_int8,
            mapped=self.mapped,
            spins=graph_name in STEPPED,
            prepared=prepared is not None,
        )
        if not on_cpu:  # what every bundle was verified on
            self._check(engine, bundle, graph_name, place_of(manifest.graphs[graph_name].sha256, self.provider))
        return engine

    def _open_compiled(self, bundle: Bundle, graph_name: str, model: Path) -> Engine:
        """One graph compiled by OpenVINO, which keeps what it compiled for the next time."""
        from runtime.backends.openvino import OpenVinoEngine, place_of  # its door, as below

        spec = bundle.manifest.graphs[graph_name]
        engine = OpenVinoEngine(model, spec, self.threads, user_cache("openvino"))
        self._check(engine, bundle, graph_name, place_of(spec.sha256))
        return engine

    def _open_plan(self, bundle: Bundle, graph_name: str) -> Engine:
        """The plan of one graph on the GPU here."""
        for option, given in (("provider", self.provider != "cpu"), ("threads", self.threads), ("mapped", self.mapped)):
            if given:
                raise InputError(f"{option}: backend 'trt' has none, it runs plans on the GPU; leave it out")
        bundle.graph(graph_name)  # said first: the bundle has no such graph
        from runtime.backends.trt.choice import open_plan  # its door, as above

        engine, place = open_plan(bundle, graph_name)
        self._check(engine, bundle, graph_name, place)
        return engine

    def _check(self, engine: Engine, bundle: Bundle, graph_name: str, place: "Place") -> None:
        """On the first use of an engine on a device; one that fails is closed."""
        if not self.checked:
            return
        from runtime.first_use import check_first_use

        try:
            check_first_use(engine, bundle, graph_name, place)
        except BaseException:
            engine.close()
            raise


CPU = Device()
"""ONNX Runtime on all cores: what every bundle is verified on."""


def available_backends() -> tuple[str, ...]:
    """Backends that this machine can run: their packages are installed, and a GPU is there for those that need one."""
    from runtime.backends.trt.choice import lacks

    here = {"ort": _installed("onnxruntime"), "openvino": _installed("onnxruntime") and _installed("openvino")}
    here["trt"] = lacks() is None
    return tuple(name for name in BACKENDS if here[name])


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
