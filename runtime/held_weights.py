"""Weights that an engine reads from their file while it runs: whether somebody wrote into it since.

onnxruntime maps weights that lie beside a graph. Who cuts such a file short under a running process ends that process
(SIGBUS), and who overwrites it gives it other weights without a word; so every request asks first. A file that is
replaced, as `qforge export` replaces a whole bundle, is no danger: what was mapped lives on under no name.
"""

import os
from contextlib import ExitStack

from runtime.bundle import Bundle
from runtime.closing import Closing
from runtime.errors import BundleError


class HeldWeights(Closing):
    """The weight files of a bundle, held open; about a microsecond a file to check."""

    def __init__(self, bundle: Bundle) -> None:
        self._files: list[tuple[str, int, tuple[int, int]]] = []
        with ExitStack() as opened:
            for graph in bundle.manifest.graphs.values():
                if graph.data is not None:
                    path = bundle.file(graph.data.file)
                    file = opened.enter_context(path.open("rb"))
                    self._files.append((str(path), file.fileno(), _state(file.fileno())))
            self._opened = opened.pop_all()

    def check(self) -> None:
        """BundleError when a file is not as it was when it was opened."""
        for path, number, before in self._files:
            if _state(number) != before:
                raise BundleError(
                    f"{path}: the file was written to while the bundle is loaded, so its answers mean nothing; put it "
                    f"back and load the bundle again (a new export replaces a bundle safely: qforge export)"
                )

    def close(self) -> None:
        """Let go of the files."""
        self._files = []
        self._opened.close()


def _state(number: int) -> tuple[int, int]:
    found = os.fstat(number)
    return found.st_size, found.st_mtime_ns
