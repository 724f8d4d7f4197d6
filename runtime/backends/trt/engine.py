"""One plan as an engine: arrays are brought to the GPU, a profile is chosen, the plan runs, outputs are brought back.

Views stay where they are. Inputs and outputs have one block of memory each, which grows and otherwise stays, so that
runs of the same shapes have the same addresses and become CUDA graphs.
"""

import weakref
from collections.abc import Mapping

from runtime.backends import Arrays, Feeds, View
from runtime.backends.trt.capture import Counts, Graphs, Key, Output
from runtime.backends.trt.elements import bytes_of, packed, unpacked
from runtime.backends.trt.memory import Block, DeviceBuffer, DeviceView
from runtime.backends.trt.plan import Context, Plan
from runtime.backends.trt.profiles import is_exact, profile_for
from runtime.backends.trt.session import Session
from runtime.closing import Closing
from runtime.engine_manifest import EngineGraph
from runtime.errors import BundleError, InputError

Shapes = dict[str, tuple[int, ...]]
REMEMBERED = 1024
"""Sets of input shapes whose output shapes are remembered."""


class TrtEngine(Closing):
    """A plan on one GPU; satisfies `runtime.backends.Engine`. Safe to share between threads, which take turns."""

    def __init__(self, plan: Plan, stated: EngineGraph, name: str, session: Session) -> None:
        """`stated` is what the engine's manifest says of the plan, `name` its graph's.

        Raises:
            BundleError: the plan has other inputs and outputs than its manifest says.
        """
        if plan.names != {*stated.inputs, *stated.outputs}:
            raise BundleError(
                f"graph '{name}': expected a plan with {sorted({*stated.inputs, *stated.outputs})}, found "
                f"{sorted(plan.names)}; build it again: qforge build"
            )
        self._plan, self._stated, self._name, self._session = plan, stated, name, session
        self._dtypes = {n: spec.dtype for n, spec in (stated.inputs | stated.outputs).items()}
        self._blocks = {n: Block(session.cuda) for n in self._dtypes if n not in plan.aliases}
        self._staging = {n: Block(session.cuda, on_host=True) for n in self._dtypes}
        self._buffers: weakref.WeakSet[DeviceBuffer] = weakref.WeakSet()
        self._contexts: dict[int, Context] = {}
        """Profile → the context of plain runs."""
        self._graphs = Graphs(session, name)
        self._output_shapes: dict[tuple[int, tuple[tuple[int, ...], ...]], Shapes] = {}
        with session.turn():
            session.scratch.join(plan.scratch_bytes)
        self._scratch_moves = session.scratch.moves
        self._open = True

    @property
    def counts(self) -> Counts:
        """How its runs were made."""
        return self._graphs.counts

    def inputs(self) -> dict[str, tuple[int | str, ...]]:
        """Name → shape of every input; a varying size is a name."""
        return {name: spec.shape for name, spec in self._stated.inputs.items()}

    def outputs(self) -> dict[str, tuple[int | str, ...]]:
        """Name → shape of every output; a varying size is a name."""
        return {name: spec.shape for name, spec in self._stated.outputs.items()}

    def aliases(self) -> Mapping[str, str]:
        """Output → the input whose memory it must lie in; see `runtime.static_cache`."""
        return self._plan.aliases

    def buffer(self, elements: int, dtype: str) -> DeviceBuffer:
        """Device memory for so many elements."""
        buffer = DeviceBuffer(self._session, elements, dtype)
        self._buffers.add(buffer)
        return buffer

    def run(self, feeds: Feeds, into: Mapping[str, View] | None = None) -> Arrays:
        """All outputs for all inputs; those named in `into` are written there and not returned.

        Raises:
            InputError: an input is missing, unknown, of another type, or of a shape that no profile holds.
            CudaError: the GPU has no memory left, or failed.
        """
        shapes = {name: tuple(feed.shape) for name, feed in feeds.items()}
        profile = profile_for(self._name, self._stated.inputs, self._stated.profiles, shapes)
        with self._session.turn():
            self._follow_scratch()
            first = profile not in self._contexts
            results = self._shapes_of(profile, shapes)
            addresses = self._placed(feeds)
            addresses |= self._targets(results, into or {}, addresses)
            key = Key(profile, tuple(shapes[n] for n in sorted(shapes)), tuple(addresses[n] for n in sorted(addresses)))
            fresh = {
                name: Output(addresses[name], shape, self._dtypes[name])
                for name, shape in results.items()
                if name not in self._plan.aliases
            }

            def plain() -> None:
                self._set(self._context(profile), shapes, addresses).enqueue(self._session.stream)

            def own() -> Context:
                return self._set(self._new_context(profile), shapes, addresses)

            self._graphs.run(key, plain, own, fresh)
            wanted = {name: shape for name, shape in results.items() if name not in (into or {})}
            arrays = self._fetched(wanted, addresses)
            if first:
                self._plan.keep_compiled()
            return arrays

    def close(self) -> None:
        """Free plan and memory, its buffers too; the engine cannot run afterwards."""
        if not self._open:
            return
        self._open = False
        with self._session.turn():
            self._session.cuda.synchronize(self._session.stream)
            self._graphs.drop()
            self._contexts.clear()
            for block in (*self._blocks.values(), *self._staging.values()):
                block.close()
            for buffer in list(self._buffers):
                buffer.close()
            self._session.free_dropped()
            self._session.scratch.leave(self._plan.scratch_bytes)
            self._plan.close()

    def _follow_scratch(self) -> None:
        """Scratch that moved since the last run: contexts are told, graphs are worthless."""
        if self._scratch_moves != self._session.scratch.moves:
            self._graphs.drop()
            for context in self._contexts.values():
                context.set_scratch(self._session.scratch.address, self._session.scratch.size)
            self._scratch_moves = self._session.scratch.moves

    def _context(self, profile: int) -> Context:
        if profile not in self._contexts:
            self._contexts[profile] = self._new_context(profile)
        return self._contexts[profile]

    def _new_context(self, profile: int) -> Context:
        context = self._plan.context(exact=is_exact(self._stated.profiles, profile))
        context.set_scratch(self._session.scratch.address, self._session.scratch.size)
        context.set_profile(profile, self._session.stream)
        return context

    def _set(self, context: Context, shapes: Shapes, addresses: Mapping[str, int]) -> Context:
        for name, shape in shapes.items():
            context.set_shape(name, shape)
        for name, address in addresses.items():
            context.set_address(name, address)
        return context

    def _shapes_of(self, profile: int, shapes: Shapes) -> Shapes:
        """Shapes of the outputs; asked once for every set of shapes."""
        key = profile, tuple(shapes[name] for name in sorted(shapes))
        if key not in self._output_shapes:
            if len(self._output_shapes) == REMEMBERED:
                self._output_shapes.clear()
            context = self._context(profile)
            for name, shape in shapes.items():
                context.set_shape(name, shape)
            self._output_shapes[key] = {name: context.shape(name) for name in self._stated.outputs}
        return self._output_shapes[key]

    def _placed(self, feeds: Feeds) -> dict[str, int]:
        """Input → address; arrays are on their way to the GPU, views are there."""
        contents = {
            name: packed(feed, self._dtypes[name], f"graph '{self._name}': input '{name}'")  # type: ignore[arg-type]
            for name, feed in feeds.items()
            if not isinstance(feed, DeviceView)
        }
        addresses = {
            name: self._own(feed, name).address for name, feed in feeds.items() if isinstance(feed, DeviceView)
        }
        for name, content in contents.items():
            addresses[name] = self._room(name, content.nbytes)
            self._staging[name].at_least(content.nbytes)
            self._staging[name].host_bytes(content.nbytes)[:] = content
            if content.nbytes:
                cuda, stream = self._session.cuda, self._session.stream
                cuda.copy(addresses[name], self._staging[name].address, content.nbytes, stream)
        return addresses

    def _targets(self, results: Shapes, into: Mapping[str, View], addresses: Mapping[str, int]) -> dict[str, int]:
        """Output → address: the caller's view, the input that it is updated in, or a block of its own."""
        if unknown := set(into) - set(results):
            raise InputError(f"graph '{self._name}': expected outputs among {sorted(results)}, found {sorted(unknown)}")
        targets = dict[str, int]()
        for name, shape in results.items():
            source = self._plan.aliases.get(name)
            if name in into:
                view = self._own(into[name], name)
                if view.shape != shape:
                    raise InputError(
                        f"graph '{self._name}': output '{name}': expected a view of shape {shape}, found {view.shape}"
                    )
                targets[name] = view.address
                if source is None and view.address in addresses.values():
                    raise InputError(
                        f"graph '{self._name}': output '{name}': expected memory of its own, found that of an input"
                    )
            elif source is None:
                targets[name] = self._room(name, bytes_of(shape, self._dtypes[name]))
            else:
                targets[name] = addresses[source]
            if source is not None and targets[name] != addresses[source]:
                raise InputError(
                    f"graph '{self._name}': output '{name}' is updated in the memory of input '{source}'; give one "
                    f"view for both"
                )
        return targets

    def _own(self, view: View, name: str) -> DeviceView:
        """A view that this GPU can use for a tensor; InputError for another."""
        if not isinstance(view, DeviceView) or view.buffer.session is not self._session:
            raise InputError(f"graph '{self._name}': '{name}': expected a view of this engine's buffers, found another")
        if view.dtype != self._dtypes[name]:
            raise InputError(
                f"graph '{self._name}': '{name}': expected a view of {self._dtypes[name]}, found {view.dtype}"
            )
        return view

    def _room(self, name: str, size: int) -> int:
        """Address of a tensor's own block, which has at least so many bytes."""
        if self._blocks[name].at_least(size):
            self._graphs.drop()
        return self._blocks[name].address

    def _fetched(self, shapes: Shapes, addresses: Mapping[str, int]) -> Arrays:
        """Outputs on the host, as arrays of their own; everything on the stream is done then."""
        cuda, stream, sizes = self._session.cuda, self._session.stream, dict[str, int]()
        for name, shape in shapes.items():
            sizes[name] = bytes_of(shape, self._dtypes[name])
            self._staging[name].at_least(sizes[name])
            if sizes[name]:
                cuda.copy(self._staging[name].address, addresses[name], sizes[name], stream)
        cuda.synchronize(stream)
        return {
            name: unpacked(self._staging[name].host_bytes(sizes[name]), shape, self._dtypes[name])
            for name, shape in shapes.items()
        }
