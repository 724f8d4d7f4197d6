"""The engine contract, and the one place that picks a backend.

One small file per backend; a backend is imported only when it is asked for. The same contract test
(tests/runtime/test_backends.py) runs against every backend present.
"""

import importlib.util
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self

import numpy.typing as npt

from runtime.bundle import Bundle
from runtime.errors import InputError

Arrays = dict[str, npt.NDArray[Any]]
"""Named arrays, as an engine returns them."""

BACKEND_PACKAGES = {"ort": "onnxruntime"}
"""Backend → the package it needs."""


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


def available_backends() -> tuple[str, ...]:
    """Backends whose package is installed here."""
    return tuple(name for name, package in BACKEND_PACKAGES.items() if importlib.util.find_spec(package) is not None)


def open_engine(bundle: Bundle, graph_name: str, backend: str = "ort", threads: int | None = None) -> Engine:
    """Open one graph of a bundle.

    Raises:
        InputError: no such backend, or fewer than one thread.
        BackendUnavailable: the backend's package is not installed.
        BundleError: the bundle has no such graph, or the backend cannot read it.
    """
    if backend not in BACKEND_PACKAGES:
        raise InputError(f"backend: expected one of {', '.join(BACKEND_PACKAGES)}, found {backend!r}")
    if threads is not None and threads < 1:
        raise InputError(f"threads: expected at least 1, found {threads}")
    from runtime.backends.ort import OrtEngine  # its door: onnxruntime loads only when it is used

    return OrtEngine(bundle.graph(graph_name), threads)
