"""The one door to the GPU: streams, memory, copies and CUDA graphs, through NVIDIA's own bindings and never torch.

Everything else of this backend sees the protocol `Cuda`, which tests replace by one that keeps device memory on the
host. Addresses are plain numbers; sizes are bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from runtime.errors import BackendUnavailable, QforgeError, require

GRAPH_NODES_NOT_COUNTED = 0
"""What `cudaGraphGetNodes` is told so that it counts the nodes and copies none."""


class CudaError(QforgeError, RuntimeError):
    """A call of CUDA that failed, out of memory among them."""


@dataclass(frozen=True)
class Gpu:
    """Which GPU this is."""

    name: str
    """As NVIDIA calls it."""
    uuid: str
    """Of this very card; hex."""
    capability: tuple[int, int]
    """Compute capability, as (8, 6)."""
    driver: str
    """Newest CUDA that its driver knows, as "13.0"."""


class Cuda(Protocol):
    """One GPU and its memory. Calls on a stream return before the work is done; all raise CudaError."""

    def gpu(self) -> Gpu:
        """Which one."""
        ...

    def use(self) -> None:
        """Make it this thread's device; CUDA keeps one per thread, and a new thread begins with the first."""
        ...

    def stream(self) -> int:
        """A new stream that does not wait for the default one."""
        ...

    def end_stream(self, stream: int) -> None:
        """Destroy a stream."""
        ...

    def synchronize(self, stream: int) -> None:
        """Wait until everything on a stream is done."""
        ...

    def allocate(self, size: int) -> int:
        """Device memory, aligned to 256 bytes."""
        ...

    def free(self, address: int) -> None:
        """Give device memory back."""
        ...

    def allocate_host(self, size: int) -> int:
        """Page-locked host memory, which copies to and from the device really overlap with."""
        ...

    def free_host(self, address: int) -> None:
        """Give page-locked memory back."""
        ...

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        """Copy between any two memories."""
        ...

    def fill(self, address: int, byte: int, size: int, stream: int) -> None:
        """Set every byte."""
        ...

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """What `work` puts on the stream, as a graph that was not run."""
        ...

    def nodes(self, graph: int) -> int:
        """Pieces of work in a captured graph."""
        ...

    def instantiate(self, graph: int) -> int:
        """A graph ready to be launched; the captured one is spent."""
        ...

    def launch(self, ready: int, stream: int) -> None:
        """Run a graph again."""
        ...

    def end_graph(self, ready: int) -> None:
        """Destroy a graph that was ready to be launched."""
        ...


class CudaRuntime:
    """The CUDA runtime by `cuda-bindings`; satisfies `Cuda`."""

    def __init__(self, ordinal: int = 0) -> None:
        """`ordinal` is the GPU's number in this process.

        Raises:
            BackendUnavailable: `cuda-bindings` is not installed, or there is no driver or GPU.
        """
        self._cudart: Any = require("cuda.bindings.runtime", extra="trt", why="backend 'trt'")
        self._ordinal = ordinal
        self._graphs: dict[int, Any] = {}
        """Handles of graphs: the bindings hand out objects, of which a number alone would not keep the type."""
        try:
            self.use()
        except CudaError as error:
            raise BackendUnavailable(
                f"backend 'trt' needs an NVIDIA GPU with its driver: {error}; run with --backend ort"
            ) from error

    def gpu(self) -> Gpu:
        """See `Cuda`."""
        found = self._done(self._cudart.cudaGetDeviceProperties(self._ordinal))
        driver = self._done(self._cudart.cudaDriverGetVersion())
        return Gpu(
            name=bytes(found.name).split(b"\0")[0].decode("utf-8", "replace"),
            uuid=bytes(found.uuid.bytes).hex(),
            capability=(int(found.major), int(found.minor)),
            driver=f"{driver // 1000}.{driver % 1000 // 10}",
        )

    def use(self) -> None:
        """See `Cuda`."""
        self._done(self._cudart.cudaSetDevice(self._ordinal))

    def stream(self) -> int:
        """See `Cuda`."""
        return int(self._done(self._cudart.cudaStreamCreateWithFlags(self._cudart.cudaStreamNonBlocking)))

    def end_stream(self, stream: int) -> None:
        """See `Cuda`."""
        self._done(self._cudart.cudaStreamDestroy(stream))

    def synchronize(self, stream: int) -> None:
        """See `Cuda`."""
        self._done(self._cudart.cudaStreamSynchronize(stream))

    def allocate(self, size: int) -> int:
        """See `Cuda`."""
        return int(self._done(self._cudart.cudaMalloc(size)))

    def free(self, address: int) -> None:
        """See `Cuda`."""
        self._done(self._cudart.cudaFree(address))

    def allocate_host(self, size: int) -> int:
        """See `Cuda`."""
        return int(self._done(self._cudart.cudaHostAlloc(size, self._cudart.cudaHostAllocDefault)))

    def free_host(self, address: int) -> None:
        """See `Cuda`."""
        self._done(self._cudart.cudaFreeHost(address))

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        """See `Cuda`; the driver tells host from device by the addresses."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDefault
        self._done(self._cudart.cudaMemcpyAsync(to, source, size, kind, stream))

    def fill(self, address: int, byte: int, size: int, stream: int) -> None:
        """See `Cuda`."""
        self._done(self._cudart.cudaMemsetAsync(address, byte, size, stream))

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """See `Cuda`. Thread-local: what other threads do meanwhile neither enters the graph nor breaks it."""
        mode = self._cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._done(self._cudart.cudaStreamBeginCapture(stream, mode))
        try:
            work()
        except BaseException:
            self._cudart.cudaStreamEndCapture(stream)  # its status is that of the error above
            raise
        return self._kept(self._done(self._cudart.cudaStreamEndCapture(stream)))

    def nodes(self, graph: int) -> int:
        """See `Cuda`."""
        _, count = self._done(self._cudart.cudaGraphGetNodes(self._graphs[graph], GRAPH_NODES_NOT_COUNTED))
        return int(count)

    def instantiate(self, graph: int) -> int:
        """See `Cuda`."""
        captured = self._graphs.pop(graph)
        try:
            return self._kept(self._done(self._cudart.cudaGraphInstantiate(captured, 0)))
        finally:
            self._cudart.cudaGraphDestroy(captured)

    def launch(self, ready: int, stream: int) -> None:
        """See `Cuda`."""
        self._done(self._cudart.cudaGraphLaunch(self._graphs[ready], stream))

    def end_graph(self, ready: int) -> None:
        """See `Cuda`."""
        self._done(self._cudart.cudaGraphExecDestroy(self._graphs.pop(ready)))

    def _kept(self, handle: Any) -> int:
        self._graphs[int(handle)] = handle
        return int(handle)

    def _done(self, returned: tuple[Any, ...]) -> Any:
        """What a call gave behind its status; CudaError when that is not success."""
        status, *values = returned
        if status != self._cudart.cudaError_t.cudaSuccess:
            _, words = self._cudart.cudaGetErrorString(status)
            said = words.decode() if isinstance(words, bytes) else str(words)
            raise CudaError(f"CUDA says: {said} ({status.name})")
        return values[0] if len(values) == 1 else tuple(values)
