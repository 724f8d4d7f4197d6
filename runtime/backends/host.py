"""Buffers in host memory, and what an engine needs that knows nothing but arrays."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends import Arrays, Feeds, View

ALIGNMENT_BYTES = 64
"""A cache line, and the widest vector register."""


class HostView:
    """Satisfies `runtime.backends.View`."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._array = array

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""
        return self._array.shape

    @property
    def dtype(self) -> str:
        """numpy's name of the element type."""
        return self._array.dtype.name

    def numpy(self) -> npt.NDArray[Any]:
        """The memory itself."""
        return self._array

    def assign(self, array: npt.NDArray[Any]) -> None:
        """Write an array of the same shape and kind of number there; ValueError for another shape."""
        check_shape(self.shape, array.shape)
        np.copyto(self._array, array, casting="same_kind")

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy whole rows, one pair (target, source) after the other."""
        for target, source in moves:
            self._array[target] = self._array[source]


class HostBuffer:
    """Satisfies `runtime.backends.Buffer`."""

    def __init__(self, elements: int, dtype: str) -> None:
        """The content is undefined at first."""
        size = elements * np.dtype(dtype).itemsize
        raw = np.empty(size + ALIGNMENT_BYTES, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT_BYTES
        self._elements: npt.NDArray[Any] = raw[start : start + size].view(dtype)

    def view(self, shape: tuple[int, ...]) -> HostView:
        """Its first elements as an array of this shape; ValueError when it has not so many."""
        return HostView(self.array(shape))

    def array(self, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """As `view`, for engines that make a view of their own of it."""
        return self._elements[: fitting(shape, len(self._elements))].reshape(shape)


class HostEngine(ABC):
    """An engine of one method, `compute`: it is handed arrays, and what it gives is written where it was asked for."""

    @abstractmethod
    def compute(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """All outputs for all inputs. The inputs may be overwritten after the call: copy what is kept."""

    def buffer(self, elements: int, dtype: str) -> HostBuffer:
        """Host memory for so many elements."""
        return HostBuffer(elements, dtype)

    def run(self, feeds: Feeds, into: Mapping[str, View] | None = None) -> Arrays:
        """All outputs for all inputs; those named in `into` are written there and not returned."""
        arrays = {name: value if isinstance(value, np.ndarray) else value.numpy() for name, value in feeds.items()}
        outputs = self.compute(arrays)
        for name, view in (into or {}).items():
            view.assign(outputs.pop(name))
        return outputs


def fitting(shape: tuple[int, ...], elements: int) -> int:
    """How many elements a shape has; ValueError when there are fewer."""
    count = math.prod(shape)
    if count > elements:
        raise ValueError(f"a view of shape {shape} has {count} elements, its buffer {elements}")
    return count


def check_shape(expected: tuple[int, ...], found: tuple[int, ...]) -> None:
    """ValueError when they differ."""
    if expected != found:
        raise ValueError(f"an array of shape {found} was written to a view of shape {expected}")
