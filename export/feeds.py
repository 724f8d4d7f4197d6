"""Inputs of a graph, kept on disk: calibrating on a thousand images takes no more memory than on ten."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from export.graphs import Arrays


class StoredFeeds(Sequence[Arrays]):
    """A list of feeds of which one is in memory at a time; its folder is the caller's to remove."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder, self._count = folder, 0

    def append(self, feed: Arrays) -> None:
        """One more run of the graph."""
        with (self._folder / f"{self._count}.npz").open("xb") as file:
            np.savez(file, allow_pickle=False, **feed)
        self._count += 1

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Arrays: ...
    @overload
    def __getitem__(self, index: slice) -> list[Arrays]: ...
    def __getitem__(self, index: int | slice) -> Arrays | list[Arrays]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        with np.load(self._folder / f"{index % self._count}.npz", allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}

    def __iter__(self) -> Iterator[Arrays]:
        return (self[number] for number in range(self._count))
