"""Memory that ONNX Runtime computes in, bound to inputs and outputs without a copy: the host's, or a GPU's.

A view is bound by `bind_input` and `bind_output`, so that the engine need not know which of the two it has. The module
`ort` is handed in: onnxruntime is imported by one file alone.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from runtime.backends.host import HostBuffer, HostView, check_shape, fitting

MOST_VIEWS = 32
"""Views that a buffer remembers."""


class Bindable(Protocol):
    """What the engine asks of its own views beside `runtime.backends.View`."""

    def bind_input(self, binding: Any, name: str) -> None:
        """Let a run read it."""
        ...

    def bind_output(self, binding: Any, name: str) -> None:
        """Let a run write it."""
        ...


class OrtHostView(HostView):
    """An array of the host that ONNX Runtime reads and writes in its place."""

    def __init__(self, ort: Any, array: npt.NDArray[Any]) -> None:
        super().__init__(array)
        # Made once: what is an output of one step is an input of the next.
        self._value = ort.OrtValue.ortvalue_from_numpy(array)

    def bind_input(self, binding: Any, name: str) -> None:
        """Let a run read it."""
        binding.bind_ortvalue_input(name, self._value)

    def bind_output(self, binding: Any, name: str) -> None:
        """Let a run write it."""
        binding.bind_ortvalue_output(name, self._value)


class OrtHostBuffer:
    """Satisfies `runtime.backends.Buffer`, for providers that compute in host memory."""

    def __init__(self, ort: Any, elements: int, dtype: str) -> None:
        self._ort, self._memory = ort, HostBuffer(elements, dtype)
        self._views: dict[tuple[int, ...], OrtHostView] = {}

    def view(self, shape: tuple[int, ...]) -> OrtHostView:
        """Its first elements as an array of this shape; ValueError when it has not so many."""
        # The steps of one request have the shapes of another's, and a view takes longer to make than to find.
        view = self._views.get(shape)
        if view is None:
            view = OrtHostView(self._ort, self._memory.array(shape))
            if len(self._views) >= MOST_VIEWS:
                self._views.clear()
            self._views[shape] = view
        return view


class OrtDeviceView:
    """The first elements of memory on a device.

    A run reads and writes it there. The host reaches it by way of the whole buffer, which is copied: that is for what
    happens now and then (rows that change places or join), not for a step.
    """

    def __init__(self, whole: Any, device: str, element: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self._whole, self._device, self._element, self._shape = whole, device, element, shape
        self._count = fitting(shape, int(whole.shape()[0]))

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""
        return self._shape

    @property
    def dtype(self) -> str:
        """numpy's name of the element type."""
        return self._element.name

    def numpy(self) -> npt.NDArray[Any]:
        """A copy."""
        elements: npt.NDArray[Any] = self._whole.numpy()
        return elements[: self._count].reshape(self._shape)

    def assign(self, array: npt.NDArray[Any]) -> None:
        """Write an array of the same shape and kind of number there; ValueError for another shape."""
        check_shape(self._shape, array.shape)
        elements = np.array(self._whole.numpy())
        elements[: self._count] = array.reshape(-1)
        self._whole.update_inplace(elements)

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy whole rows, one pair (target, source) after the other."""
        elements = np.array(self._whole.numpy())
        HostView(elements[: self._count].reshape(self._shape)).move(moves)
        self._whole.update_inplace(elements)

    def bind_input(self, binding: Any, name: str) -> None:
        """Let a run read it."""
        binding.bind_input(name, self._device, 0, self._element, self._shape, self._whole.data_ptr())

    def bind_output(self, binding: Any, name: str) -> None:
        """Let a run write it."""
        binding.bind_output(name, self._device, 0, self._element, self._shape, self._whole.data_ptr())


class OrtDeviceBuffer:
    """Satisfies `runtime.backends.Buffer`, for providers with memory of their own."""

    def __init__(self, ort: Any, device: str, elements: int, dtype: str) -> None:
        """`device` is ONNX Runtime's name of it: cuda."""
        self._device, self._element = device, np.dtype(dtype)
        self._whole = ort.OrtValue.ortvalue_from_shape_and_type([elements], self._element.type, device, 0)

    def view(self, shape: tuple[int, ...]) -> OrtDeviceView:
        """Its first elements as an array of this shape; ValueError when it has not so many."""
        return OrtDeviceView(self._whole, self._device, self._element, shape)
