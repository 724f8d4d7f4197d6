"""The one door to `tensorrt` and `tensorrt_rtx`, which have one API: a plan becomes an engine, an engine has contexts.

Everything else of this backend sees the protocols `Plan` and `Context`, which tests replace. TensorRT answers most
calls with a truth value and writes the reason to its log, so every answer is looked at here.

TensorRT-RTX leaves a part of the building to the GPU's first run. What it made there is kept in a runtime cache, which
it checks itself when it is given back, so that only the first process on a GPU pays.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from runtime.engine_manifest import EngineName
from runtime.errors import BackendUnavailable, BundleError, require
from runtime.files import write_bytes_atomic
from runtime.gpu import MODULES


class Context(Protocol):
    """One way of running a plan: a profile, shapes and addresses. BundleError where TensorRT refuses one."""

    def set_profile(self, number: int, stream: int) -> None:
        """Choose the kernels; shapes and addresses are forgotten."""
        ...

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Of an input."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an output, once all inputs have theirs."""
        ...

    def set_address(self, name: str, address: int) -> None:
        """Where an input is read or an output written (device memory)."""
        ...

    def set_scratch(self, address: int, size: int) -> None:
        """Memory (bytes) that it may use while it runs, and that others may use while it does not."""
        ...

    def capturable(self, stream: int) -> bool:
        """Whether a run may be captured in a CUDA graph."""
        ...

    def enqueue(self, stream: int) -> None:
        """Put one run on the stream."""
        ...


class Plan(Protocol):
    """A plan that was loaded."""

    @property
    def names(self) -> frozenset[str]:
        """Inputs and outputs."""
        ...

    @property
    def aliases(self) -> Mapping[str, str]:
        """Output → the input whose memory it must lie in: caches that are updated in place."""
        ...

    @property
    def scratch_bytes(self) -> int:
        """Memory that any of its contexts needs while it runs."""
        ...

    def context(self, exact: bool) -> Context:
        """A new context without scratch memory; `exact`: it will see one set of shapes only."""
        ...

    def keep_compiled(self) -> None:
        """Store what this GPU's first run compiled, where there is such a thing."""
        ...

    def close(self) -> None:
        """Free it; its contexts must be gone."""
        ...


class TensorRtPlan:
    """A plan loaded by TensorRT or TensorRT-RTX on this thread's GPU; satisfies `Plan`."""

    def __init__(self, file: Path, engine: EngineName, compiled: Path) -> None:
        """`compiled` is where TensorRT-RTX keeps what it compiles on this GPU.

        Raises:
            BackendUnavailable: the module is not installed, or cannot be loaded.
            BundleError: it cannot load the plan.
        """
        self._trt, self._compiled, self._file = load_module(engine), compiled, file
        self._log = _log_of(self._trt)
        runtime = self._trt.Runtime(self._log)
        self._engine = runtime.deserialize_cuda_engine(file.read_bytes())
        if self._engine is None:
            raise BundleError(
                f"{file}: {engine} {self._trt.__version__} cannot load this plan: {self._log.last}; build it again on "
                f"this machine: qforge build --engine {engine}"
            )
        self._runtime: Any = runtime
        self._cache: Any = None
        self._cached = b""
        """What the runtime cache held when it was last read or written."""
        tensors = [self._engine.get_tensor_name(place) for place in range(self._engine.num_io_tensors)]
        self.names = frozenset(tensors)
        outputs = [n for n in tensors if self._engine.get_tensor_mode(n) == self._trt.TensorIOMode.OUTPUT]
        aliased = {name: self._engine.get_aliased_input_tensor(name) for name in outputs}
        self.aliases = {name: source for name, source in aliased.items() if source}

    @property
    def scratch_bytes(self) -> int:
        """See `Plan`: the most that any profile needs."""
        return int(self._engine.device_memory_size_v2)

    def context(self, exact: bool) -> "TensorRtContext":
        """See `Plan`. RTX compiles kernels for the very shapes of an exact profile at once, and for others never:
        a cache that grows by a position a step would have it compile at every step."""
        by_user = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(self._trt, "IRuntimeCache"):  # TensorRT compiles nothing at run time
            made = self._engine.create_execution_context(by_user)
        else:
            strategies = self._trt.DynamicShapesKernelSpecializationStrategy
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(by_user)
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.DISABLED  # we capture, and check what we captured
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER if exact else strategies.NONE
            config.set_runtime_cache(self._shared_cache(config))
            made = self._engine.create_execution_context(config)
        if made is None:
            raise BundleError(f"{self._file}: TensorRT made no execution context: {self._log.last}")
        return TensorRtContext(made, self._log, self._file)

    def keep_compiled(self) -> None:
        """See `Plan`: written when there is something new."""
        if self._cache is None:
            return
        content = bytes(self._cache.serialize())
        if content != self._cached:
            write_bytes_atomic(self._compiled, content)
            self._cached = content

    def close(self) -> None:
        """See `Plan`: the engine before the runtime that it came from."""
        self._cache = self._engine = None
        self._runtime = None

    def _shared_cache(self, config: Any) -> Any:
        """The one runtime cache of all contexts; begins with the stored one where that is of this GPU and version."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._compiled.is_file():
                stored = self._compiled.read_bytes()
                if self._cache.deserialize(stored):
                    self._cached = stored
        return self._cache


class TensorRtContext:
    """An execution context; satisfies `Context`."""

    def __init__(self, context: Any, log: Any, file: Path) -> None:
        self._context, self._log, self._file = context, log, file

    def set_profile(self, number: int, stream: int) -> None:
        """See `Context`."""
        self._done(self._context.set_optimization_profile_async(number, stream), f"profile {number}")

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """See `Context`."""
        self._done(self._context.set_input_shape(name, shape), f"input '{name}' of shape {shape}")

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Context`."""
        shape = tuple(self._context.get_tensor_shape(name))
        self._done(min(shape, default=0) >= 0, f"output '{name}', whose shape it cannot tell")
        return shape

    def set_address(self, name: str, address: int) -> None:
        """See `Context`."""
        self._done(self._context.set_tensor_address(name, address), f"an address of '{name}'")

    def set_scratch(self, address: int, size: int) -> None:
        """See `Context`."""
        self._context.set_device_memory(address, size)

    def capturable(self, stream: int) -> bool:
        """See `Context`; a TensorRT without the question is tried."""
        asked = getattr(self._context, "is_stream_capturable", None)
        return True if asked is None else bool(asked(stream))

    def enqueue(self, stream: int) -> None:
        """See `Context`."""
        self._done(self._context.execute_async_v3(stream), "to run")

    def _done(self, said: bool, what: str) -> None:
        if not said:
            raise BundleError(f"{self._file}: TensorRT refuses {what}: {self._log.last}")


def load_module(engine: EngineName) -> Any:
    """The Python module of a builder.

    Raises:
        BackendUnavailable: it is not installed, or a library that it needs is not.
    """
    try:
        return require(MODULES[engine], extra=engine, why=f"Running plans of {engine}")
    except (OSError, RuntimeError) as error:  # the wheel is here, a library of the driver is not
        raise BackendUnavailable(f"{engine} is installed and cannot be loaded: {error}") from error


@cache
def _log_of(trt: Any) -> Any:
    """The one logger of a module, which keeps the first it is given; it holds the last complaint and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = "no reason"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.last = message.strip()

    return Log()
