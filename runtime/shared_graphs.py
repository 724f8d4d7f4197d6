"""One vision tower for two uses: what answering has opened, searching borrows."""

from collections.abc import Mapping

from runtime.backends import Arrays, Buffer, Engine, Feeds, Opener, View
from runtime.bundle import Bundle
from runtime.closing import Closing


class Lender:
    """Opens graphs on a device and remembers them; satisfies `runtime.backends.Opener`."""

    def __init__(self, device: Opener) -> None:
        self._device, self.in_place = device, device.in_place
        self._opened: dict[str, Engine] = {}

    def open(self, bundle: Bundle, graph_name: str) -> Engine:
        """One graph, the caller's to close."""
        engine = self._opened[graph_name] = self._device.open(bundle, graph_name)
        return engine

    def borrower(self) -> "Borrower":
        """Who takes what is open, as long as its owner keeps it so."""
        return Borrower(self._device, dict(self._opened))


class Borrower:
    """Opens only what is not open yet; satisfies `runtime.backends.Opener`."""

    def __init__(self, device: Opener, lent: Mapping[str, Engine]) -> None:
        self._device, self._lent, self.in_place = device, lent, device.in_place

    def open(self, bundle: Bundle, graph_name: str) -> Engine:
        """One graph: lent, or checked once more and opened.

        Raises:
            BundleError: a file of the graph is not the one that was checked when the bundle was read.
        """
        if graph_name in self._lent:
            return Borrowed(self._lent[graph_name])
        bundle.check_graph(graph_name)
        return self._device.open(bundle, graph_name)


class Borrowed(Closing):
    """An engine that another owns: closing it does nothing."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def inputs(self) -> dict[str, tuple[int | str, ...]]:
        """See `runtime.backends.Engine`."""
        return self._engine.inputs()

    def outputs(self) -> dict[str, tuple[int | str, ...]]:
        """See `runtime.backends.Engine`."""
        return self._engine.outputs()

    def buffer(self, elements: int, dtype: str) -> Buffer:
        """See `runtime.backends.Engine`."""
        return self._engine.buffer(elements, dtype)

    def run(self, feeds: Feeds, into: Mapping[str, View] | None = None) -> Arrays:
        """See `runtime.backends.Engine`."""
        return self._engine.run(feeds, into)

    def close(self) -> None:
        """Leave the engine to its owner."""
