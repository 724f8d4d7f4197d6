"""ONNX Runtime on the CPU. The only file that imports onnxruntime."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy.typing as npt

from runtime.backends.cores import physical_cores
from runtime.errors import BundleError, require


class OrtEngine:
    """One ONNX graph in one inference session; satisfies `runtime.backends.Engine`."""

    def __init__(self, model: Path, threads: int | None) -> None:
        """Open the graph; `threads` None takes every physical core this process may use.

        Raises:
            BackendUnavailable: onnxruntime is not installed.
            BundleError: onnxruntime cannot read the graph.
        """
        ort: Any = require("onnxruntime", extra="cpu", why="backend 'ort'")
        options = ort.SessionOptions()
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.intra_op_num_threads = threads or physical_cores()
        options.inter_op_num_threads = 1
        # The graphs of a bundle run in turn on the same cores: idle threads of one must not spin while another works.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # errors only; they arrive as exceptions
        try:
            self._session: Any = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a class per cause and no common base
            raise BundleError(f"{model}: onnxruntime {ort.__version__} cannot open this graph: {error}") from error
        self._output_names = [output.name for output in self._session.get_outputs()]

    def inputs(self) -> dict[str, tuple[int | str, ...]]:
        """Name → shape of every input; a varying size is a name."""
        return _shapes(self._session.get_inputs())

    def outputs(self) -> dict[str, tuple[int | str, ...]]:
        """Name → shape of every output; a varying size is a name."""
        return _shapes(self._session.get_outputs())

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """All outputs for all inputs; the arrays belong to the caller."""
        arrays = self._session.run(self._output_names, dict(feeds))
        return dict(zip(self._output_names, arrays, strict=True))

    def close(self) -> None:
        """Free the session; the engine cannot run afterwards."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _shapes(values: Any) -> dict[str, tuple[int | str, ...]]:
    """onnxruntime gives None for a varying size that has no name."""
    return {value.name: tuple("?" if size is None else size for size in value.shape) for value in values}
