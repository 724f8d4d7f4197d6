"""What is asked before every request: is the bundle still open, and its weights as they were.

onnxruntime maps weights that lie beside a graph. Who cuts such a file short under a running process ends that process
(SIGBUS), and who overwrites it gives it other weights without a word. A file that is replaced, as `qforge export`
replaces a whole bundle, is no danger: what was mapped lives on under no name.
"""

import os
from contextlib import ExitStack

from runtime.bundle import PREPARED, Bundle
from runtime.closing import Closing
from runtime.errors import BundleError, PipelineClosed


class HeldWeights(Closing):
    """The weight files of an open bundle, held open too; a few microseconds a file to check."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle, self._closed = bundle, False
        self._files: list[tuple[str, int, tuple[int, int]]] = []
        with ExitStack() as opened:
            beside = [bundle.path / graph.data.file for graph in bundle.manifest.graphs.values() if graph.data]
            for path in (*beside, *sorted((bundle.path / PREPARED).glob("*.data"))):
                if path.is_file():  # a Triton server has its own copies
                    file = opened.enter_context(path.open("rb"))
                    self._files.append((str(path), file.fileno(), _state(file.fileno())))
            self._opened = opened.pop_all()

    def check(self) -> None:
        """PipelineClosed when the bundle was closed, BundleError when a file is not as it was when it was opened."""
        if self._closed:
            raise PipelineClosed(f"{self._bundle.path}: this bundle was closed; load it again")
        for path, number, before in self._files:
            if _state(number) != before:
                raise BundleError(
                    f"{path}: the file was written to while the bundle is loaded, so its answers mean nothing; put it "
                    f"back and load the bundle again (a new export replaces a bundle safely: qforge export)"
                )

    def close(self) -> None:
        """Let go of the files."""
        self._closed = True
        self._opened.close()


def _state(number: int) -> tuple[int, int]:
    found = os.fstat(number)
    return found.st_size, found.st_mtime_ns
