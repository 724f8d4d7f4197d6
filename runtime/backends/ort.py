"""ONNX Runtime on one execution provider. The only file that imports onnxruntime."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from runtime.backends import Arrays, Buffer, Feeds, View
from runtime.backends.memory import raise_for_memory
from runtime.backends.ort_memory import Bindable, OrtDeviceBuffer, OrtHostBuffer
from runtime.backends.providers import DEVICES, available_providers, execution_provider, require_taken
from runtime.closing import Closing
from runtime.cores import physical_cores
from runtime.errors import BackendUnavailable, BundleError, require
from runtime.first_use import Place
from runtime.machine import describe
from runtime.provider import Provider

SPIN_US = "100"
"""How long (microseconds) a thread waits without sleeping: longer than between two products of a graph, shorter than
between two requests."""
PREPARING = {
    "save_external_prepacked_constant_initializers": "1",
    "optimized_model_external_initializers_min_size_in_bytes": "1024",
}
"""What a prepared graph's weights lie in: a file beside it, packed."""


class OrtEngine(Closing):
    """One ONNX graph in one inference session; satisfies `runtime.backends.Engine`."""

    def __init__(
        self,
        model: Path,
        provider: Provider = "cpu",
        threads: int | None = None,
        *,
        fuse_int8: bool = True,
        mapped: bool = False,
        spins: bool = False,
        prepared: bool = False,
        prepare_as: Path | None = None,
    ) -> None:
        """Open the graph; `threads` None takes every physical core this process may use.

        `spins` lets threads wait for their next piece of work without sleeping, which is faster in a graph of
        many small products; `prepared`: the file was rewritten and packed before; `prepare_as` writes such a file.
        `mapped` leaves weights beside the graph in their file, where onnxruntime's CPU would pack them into memory.
        `fuse_int8` False computes Q/DQ pairs as they stand; see `Manifest.fuses_int8`.

        Raises:
            BackendUnavailable: onnxruntime is not installed, or this one has no such provider, or that cannot start.
            BundleError: onnxruntime cannot read the graph, or the provider leaves work of it to the CPU.
        """
        ort = _onnxruntime()
        name = execution_provider(ort, provider)
        options = ort.SessionOptions()
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.intra_op_num_threads = threads or physical_cores()
        options.inter_op_num_threads = 1
        # The graphs of a bundle run in turn on the same cores: idle threads of one must not spin while another works.
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spins else "0")
        if spins:
            options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_US)
        options.add_session_config_entry("session.disable_quant_qdq", "0" if fuse_int8 else "1")
        options.add_session_config_entry("session.disable_prepacking", "1" if mapped else "0")
        if prepared:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if prepare_as is not None:
            options.optimized_model_filepath = str(prepare_as)
            for key, value in PREPARING.items():
                options.add_session_config_entry(f"session.{key}", value)
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", f"{prepare_as.name}.data"
            )
        options.log_severity_level = 3  # errors only; they arrive as exceptions
        if provider != "cpu":
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        try:
            self._session: Any = ort.InferenceSession(str(model), options, providers=[name], enable_fallback=0)
        except Exception as error:  # onnxruntime has a class per cause and no common base
            raise BundleError(
                f"{model}: onnxruntime {ort.__version__} cannot open this graph on {name}: {error}"
            ) from error
        require_taken(self._session, provider, str(model))
        self._device = DEVICES.get(provider, "cpu")
        self._output_names = [output.name for output in self._session.get_outputs()]

    def inputs(self) -> dict[str, tuple[int | str, ...]]:
        """Name → shape of every input; a varying size is a name."""
        return _shapes(self._session.get_inputs())

    def outputs(self) -> dict[str, tuple[int | str, ...]]:
        """Name → shape of every output; a varying size is a name."""
        return _shapes(self._session.get_outputs())

    def buffer(self, elements: int, dtype: str) -> Buffer:
        """Memory for so many elements where the provider computes."""
        ort = _onnxruntime()
        if self._device == "cpu":
            return OrtHostBuffer(ort, elements, dtype)
        return OrtDeviceBuffer(ort, self._device, elements, dtype)

    def run(self, feeds: Feeds, into: Mapping[str, View] | None = None) -> Arrays:
        """All outputs for all inputs; those named in `into` are written there, the others belong to the caller.

        OutOfMemory leaves the engine usable.
        """
        try:
            return self._run(feeds, into or {})
        except Exception as error:  # a class per cause and no common base
            raise_for_memory(error)
            raise

    def _run(self, feeds: Feeds, into: Mapping[str, View]) -> Arrays:
        returned = [name for name in self._output_names if name not in into]
        if not into and all(isinstance(value, np.ndarray) for value in feeds.values()):
            return dict(zip(returned, self._session.run(returned, dict(feeds)), strict=True))
        binding = self._session.io_binding()  # of this call: another thread has its own
        for name, value in feeds.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
            else:
                cast(Bindable, value).bind_input(binding, name)
        for name in returned:
            binding.bind_output(name)
        for name, view in into.items():
            cast(Bindable, view).bind_output(binding, name)
        self._session.run_with_iobinding(binding)
        if self._device != "cpu":
            binding.synchronize_outputs()
        values = binding.get_outputs_as_ortvaluevector()  # in the order in which they were bound
        return {name: values[place].numpy() for place, name in enumerate(returned)}

    def close(self) -> None:
        """Free the session; the engine cannot run afterwards."""
        self._session = None


def place_of(model: str, provider: Provider) -> Place:
    """Where a graph of this SHA-256 runs, for `runtime.first_use`."""
    here = describe()
    device = f"{here['cpu']}, GPU {here['gpu']}, provider {provider}"
    return Place(model, device, f"onnxruntime {_onnxruntime().__version__}")


def providers_here() -> tuple[Provider, ...]:
    """Providers of the onnxruntime installed here; none without it."""
    try:
        return available_providers(_onnxruntime())
    except BackendUnavailable:
        return ()


def ort_version() -> str | None:
    """Of the onnxruntime installed here; None without it."""
    try:
        return str(_onnxruntime().__version__)
    except BackendUnavailable:
        return None


def _onnxruntime() -> Any:
    return require("onnxruntime", extra="cpu", why="backend 'ort'")


def _shapes(values: Any) -> dict[str, tuple[int | str, ...]]:
    """onnxruntime gives None for a varying size that has no name."""
    return {value.name: tuple("?" if size is None else size for size in value.shape) for value in values}
