"""OpenVINO on the CPU, for the graphs that look at an image. The only file that imports openvino.

Its INT8 products end in the bias, the GELU and the rounding that follow them, so nothing of them is written to memory
in between; ONNX Runtime has no such products. Graphs that run once a token stay with ONNX Runtime, which updates their
caches in place and reads narrow weights faster (LOG.md); `runtime.backends.Device` says so in one place.
"""

import queue
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends import Arrays
from runtime.backends.host import HostEngine
from runtime.backends.memory import raise_for_memory
from runtime.closing import Closing
from runtime.cores import physical_cores
from runtime.errors import BundleError, require
from runtime.first_use import Place
from runtime.machine import describe
from runtime.manifest import GraphEntry


class OpenVinoEngine(HostEngine, Closing):
    """One ONNX graph compiled for this CPU; satisfies `runtime.backends.Engine`."""

    def __init__(self, model: Path, spec: GraphEntry, threads: int | None = None, cache: Path | None = None) -> None:
        """Compile the graph; `threads` None takes every physical core this process may use.

        `spec` names its inputs and outputs and the sizes that vary, which OpenVINO forgets. `cache` is a folder in
        which OpenVINO keeps what it compiled; None compiles anew.

        Raises:
            BackendUnavailable: openvino is not installed.
            BundleError: OpenVINO cannot read or compile the graph.
        """
        openvino = _openvino()
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads or physical_cores(),
            "INFERENCE_PRECISION_HINT": "f32",  # what is not INT8 in the graph stays as it was written
        }
        core = openvino.Core()
        if cache is not None:
            core.set_property({"CACHE_DIR": str(cache)})
        self._spec = spec
        try:
            self._model: Any = core.compile_model(str(model), "CPU", settings)
        except RuntimeError as error:
            raise BundleError(f"{model}: openvino {version()} cannot compile it: {_first_line(error)}") from error
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        """Requests that no thread runs now; there are as many as once ran together."""

    def inputs(self) -> dict[str, tuple[int | str, ...]]:
        """Name → shape of every input; a varying size is a name."""
        return {name: tensor.shape for name, tensor in self._spec.inputs.items()}

    def outputs(self) -> dict[str, tuple[int | str, ...]]:
        """Name → shape of every output; a varying size is a name."""
        return {name: tensor.shape for name, tensor in self._spec.outputs.items()}

    def compute(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """All outputs for all inputs; OutOfMemory leaves the engine usable."""
        try:
            request = self._requests.get_nowait()
        except queue.Empty:
            request = self._model.create_infer_request()
        try:
            given = request.infer({name: np.ascontiguousarray(array) for name, array in feeds.items()})
            return {name: np.array(given[name]) for name in self._spec.outputs}
        except RuntimeError as error:
            raise_for_memory(error)
            raise
        finally:
            self._requests.put(request)

    def close(self) -> None:
        """Free the graph; the engine cannot run afterwards."""
        self._requests = queue.SimpleQueue()
        self._model = None


def place_of(model: str) -> Place:
    """Where a graph of this SHA-256 runs, for `runtime.first_use`."""
    return Place(model, str(describe()["cpu"]), f"openvino {version()}")


def version() -> str:
    """Of the openvino installed here."""
    return str(_openvino().__version__).partition("-")[0]  # the build's hash follows


def _openvino() -> Any:
    return require("openvino", extra="openvino", why="backend 'openvino'")


def _first_line(error: Exception) -> str:
    """What OpenVINO says behind the places in its source that it begins with."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line and not line.startswith("Exception from")), type(error).__name__)
