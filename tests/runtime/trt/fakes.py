"""What stands in for the GPU: device memory that lies on the host and is guarded, and a plan that onnxruntime computes.

Both are strict where the real ones fail in silence or crash: memory that was given back, allocations while a graph is
captured, a capture before the first plain run. So the engine's own logic runs in full, on real graphs.
"""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from export.engines.profiles import profiles_of
from runtime.backends.ort import OrtEngine
from runtime.backends.trt.cuda import CudaError, Gpu
from runtime.backends.trt.elements import bytes_of, packed, unpacked
from runtime.backends.trt.engine import TrtEngine
from runtime.backends.trt.session import Session
from runtime.bundle import Bundle, read_bundle
from runtime.engine_manifest import EngineGraph, EngineProfile
from runtime.manifest import FileEntry

AXES = {"B": "batch", "S": "new", "P": "past", "P+S": "past + new", "T": "tokens"}
"""The tiny graphs' names of varying sizes → those that exported bundles have."""
GPU = Gpu("Fake RTX", "c0ffee", (8, 6), "13.0")


class FakeCuda:
    """Satisfies `Cuda`; `empty_graphs` is the trap of a wrong device, `limit` the memory (bytes) of the GPU."""

    def __init__(self, limit: int = 1 << 30, empty_graphs: bool = False) -> None:
        self.limit, self.empty_graphs = limit, empty_graphs
        self.memory: dict[int, Any] = {}
        self.host: dict[int, Any] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.capturing: list[Callable[[], None]] | None = None
        self.log: list[str] = []
        self.alters_replay: Callable[[], None] | None = None

    def gpu(self) -> Gpu:
        return GPU

    def use(self) -> None:
        self.log.append("use")

    def stream(self) -> int:
        return 7

    def end_stream(self, stream: int) -> None:
        raise AssertionError("the session lives as long as the process")

    def synchronize(self, stream: int) -> None:
        assert stream == 7 and self.capturing is None, "a capture may not be waited for"
        self.log.append("synchronize")

    def allocate(self, size: int) -> int:
        assert self.capturing is None, "no memory while a graph is captured"
        if self.held + size > self.limit:
            raise CudaError("CUDA says: out of memory (cudaErrorMemoryAllocation)")
        self.log.append(f"allocate {size}")
        block = ctypes.create_string_buffer(b"\xaa" * size, size)
        self.memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, address: int) -> None:
        assert self.capturing is None, "no memory while a graph is captured"
        del self.memory[address]

    def allocate_host(self, size: int) -> int:
        block = ctypes.create_string_buffer(size)
        self.host[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free_host(self, address: int) -> None:
        del self.host[address]

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        assert size > 0 and stream == 7
        for address in (to, source):
            self.guard(address, size)
        ctypes.memmove(to, source, size)

    def fill(self, address: int, byte: int, size: int, stream: int) -> None:
        self.guard(address, size)
        ctypes.memset(address, byte, size)

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        assert stream == 7
        self.capturing = []
        work()
        captured, self.capturing = self.capturing, None
        self.graphs[len(self.log) + 1000] = [] if self.empty_graphs else captured
        return len(self.log) + 1000

    def nodes(self, graph: int) -> int:
        return len(self.graphs[graph])

    def instantiate(self, graph: int) -> int:
        self.log.append("instantiate")
        self.graphs[-graph] = self.graphs.pop(graph)
        return -graph

    def launch(self, ready: int, stream: int) -> None:
        self.log.append("launch")
        for work in self.graphs[ready]:
            work()
        if self.alters_replay is not None:
            self.alters_replay()

    def end_graph(self, ready: int) -> None:
        del self.graphs[ready]

    def submit(self, work: Callable[[], None]) -> None:
        """A kernel: run now, or kept while a graph is captured."""
        if self.capturing is None:
            work()
        else:
            self.capturing.append(work)

    def guard(self, address: int, size: int) -> None:
        """The bytes lie in memory that is held."""
        for start, block in (self.memory | self.host).items():
            if start <= address and address + size <= start + len(block):
                return
        raise AssertionError("an address outside of all memory")

    @property
    def held(self) -> int:
        """Bytes of device memory."""
        return sum(len(block) for block in self.memory.values())


@dataclass
class FakePlan:
    """Satisfies `Plan`: onnxruntime computes what lies at the addresses and writes it there."""

    stated: EngineGraph
    onnx: OrtEngine
    cuda: FakeCuda
    scratch_bytes: int = 512
    aliases: Mapping[str, str] = field(default_factory=dict)
    can_capture: bool = True
    contexts: list["FakeContext"] = field(default_factory=list)
    compiled: int = 0
    closed: bool = False

    @property
    def names(self) -> frozenset[str]:
        return frozenset({**self.stated.inputs, **self.stated.outputs})

    def context(self, exact: bool) -> "FakeContext":
        self.contexts.append(FakeContext(self, exact))
        return self.contexts[-1]

    def keep_compiled(self) -> None:
        self.compiled += 1

    def close(self) -> None:
        self.closed = True


class FakeContext:
    """Satisfies `Context`."""

    def __init__(self, plan: FakePlan, exact: bool) -> None:
        self.plan, self.exact, self.profile = plan, exact, -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)
        self.flushed: object = None

    def set_profile(self, number: int, stream: int) -> None:
        self.profile, self.shapes = number, {}

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        profiles = self.plan.stated.profiles
        assert not profiles or profiles[self.profile].holds({**self.least(), name: shape})
        self.shapes[name] = shape

    def least(self) -> dict[str, tuple[int, ...]]:
        return {name: least for name, (least, _, _) in self.plan.stated.profiles[self.profile].shapes.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        feeds = {n: np.ones(self.shapes[n], spec.dtype) for n, spec in self.plan.stated.inputs.items()}
        return self.plan.onnx.run(feeds)[name].shape

    def set_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def set_scratch(self, address: int, size: int) -> None:
        assert size >= self.plan.scratch_bytes
        self.scratch = (address, size)

    def capturable(self, stream: int) -> bool:
        return self.plan.can_capture

    def enqueue(self, stream: int) -> None:
        frozen = (self.profile, dict(self.shapes), dict(self.addresses), self.scratch)
        if self.plan.cuda.capturing is not None:
            assert self.flushed == frozen, "the first run with new shapes may not be captured"
        self.flushed = frozen
        for name, source in self.plan.aliases.items():
            assert self.addresses[name] == self.addresses[source], "updated in place"
        self.plan.cuda.submit(lambda: self.compute(*frozen))

    def compute(self, _: int, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int], scratch: Any) -> None:
        cuda, stated = self.plan.cuda, self.plan.stated
        cuda.fill(scratch[0], 0x55, scratch[1], 7)
        feeds = {
            name: unpacked(self.bytes_at(addresses[name], bytes_of(shapes[name], spec.dtype)), shapes[name], spec.dtype)
            for name, spec in stated.inputs.items()
        }
        for name, array in self.plan.onnx.run(feeds).items():
            content = packed(array, stated.outputs[name].dtype, name)
            self.bytes_at(addresses[name], content.nbytes)[:] = content

    def bytes_at(self, address: int, size: int) -> Any:
        self.plan.cuda.guard(address, size)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def with_axes(path: Path) -> Bundle:
    """A tiny bundle whose graphs vary along the axes that exported ones have."""
    bundle = read_bundle(path)
    for entry in bundle.manifest.graphs.values():
        for specs in (entry.inputs, entry.outputs):
            for name, spec in specs.items():
                specs[name] = spec.model_copy(update={"shape": tuple(AXES.get(size, size) for size in spec.shape)})
    return bundle


def stated(bundle: Bundle, name: str, profiles: tuple[EngineProfile, ...]) -> EngineGraph:
    """What an engine's manifest would say of a graph."""
    entry = bundle.manifest.graphs[name]
    plan = FileEntry(file=f"{name}.plan", sha256="0" * 64, bytes=1)
    facts = {"inputs": entry.inputs, "outputs": entry.outputs, "build_s": 1.0, "peak_rss_bytes": 1}
    return EngineGraph(plan=plan, onnx_sha256=entry.sha256, data_sha256=None, profiles=profiles, **facts)


@dataclass
class FakeOpener:
    """Opens graphs of bundles as TensorRT engines on a fake GPU; satisfies `runtime.backends.Opener`."""

    cuda: FakeCuda = field(default_factory=FakeCuda)
    plans: dict[str, FakePlan] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    in_place = True

    def __post_init__(self) -> None:
        self.session = Session(self.cuda)

    def open(self, bundle: Bundle, graph_name: str) -> TrtEngine:
        said = stated(bundle, graph_name, profiles_of(graph_name, bundle.manifest))
        self.plans[graph_name] = FakePlan(
            said, OrtEngine(bundle.graph(graph_name), threads=1), self.cuda, **self.settings
        )
        return TrtEngine(self.plans[graph_name], said, graph_name, self.session)


def plan_of(model: Path, stated: EngineGraph, cuda: FakeCuda, **settings: Any) -> FakePlan:
    """A plan of an ONNX file."""
    return FakePlan(stated, OrtEngine(model, threads=1), cuda, **settings)
