"""The engine contract, and the one place that picks a backend.

One small file per backend; a backend is imported only when it is asked for. The same contract test
(tests/runtime/test_backends.py) runs against every backend present. Where graphs run is one value, `Device`: the
command line makes it and the engines read it, so nothing in between lists its parts.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import numpy.typing as npt

from runtime.bundle import Bundle
from runtime.errors import BackendUnavailable, InputError
from runtime.provider import Provider

Arrays = dict[str, npt.NDArray[Any]]
"""Named arrays, as an engine returns them."""

BACKEND_PACKAGES = {"ort": "onnxruntime"}
"""Backend → the package it needs."""


STEPPED = frozenset({"language", "decoder"})
"""Graphs that run once a token."""


class Engine(Protocol):
    """One compiled graph: named arrays in, named arrays out."""

    def inputs(self) -> dict[str, tuple[int | str, ...]]:
        """Name → shape of every input; a varying size is a name."""
        ...

    def outputs(self) -> dict[str, tuple[int | str, ...]]:
        """Name → shape of every output; a varying size is a name."""
        ...

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """All outputs for all inputs; the arrays belong to the caller."""
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

    def open(self, bundle: Bundle, graph_name: str) -> Engine:
        """Open one graph of a bundle.

        Raises:
            InputError: no such backend or provider, or fewer than one thread.
            BackendUnavailable: the package of the backend or provider is not installed, the provider cannot start, or
                it cannot compute in the graph's type.
            BundleError: the bundle has no such graph, or the provider cannot run it whole.
        """
        if self.backend not in BACKEND_PACKAGES:
            raise InputError(f"backend: expected one of {', '.join(BACKEND_PACKAGES)}, found {self.backend!r}")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads: expected at least 1, found {self.threads}")
        model, manifest = bundle.graph(graph_name), bundle.manifest
        if self.provider == "cpu" and not manifest.graphs[graph_name].on_cpu:
            raise BackendUnavailable(
                f"{bundle.path}: graph '{graph_name}' computes in BF16, which backend '{self.backend}' cannot do on a "
                f"CPU; build an engine for a GPU (qforge build {bundle.path}), or export with --precision fp16 or fp32"
            )
        from runtime.backends.ort import OrtEngine  # its door: onnxruntime loads only when it is used
        from runtime.prepared import prepared_graph

        on_cpu = self.provider == "cpu" and not self.mapped
        prepared = prepared_graph(bundle, graph_name) if on_cpu else None
        return OrtEngine(
            prepared or model,
            self.provider,
            self.threads,
            fuse_int8=manifest.fuses_int8,
            mapped=self.mapped,
            spins=graph_name in STEPPED,
            prepared=prepared is not None,
        )


CPU = Device()
"""ONNX Runtime on all cores: what every bundle is verified on."""


def available_backends() -> tuple[str, ...]:
    """Backends whose package is installed here."""
    return tuple(name for name, package in BACKEND_PACKAGES.items() if importlib.util.find_spec(package) is not None)
