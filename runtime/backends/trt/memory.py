"""Memory on the GPU and its host side: blocks that grow, scratch that engines share, buffers that callers hold."""

import ctypes
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from runtime.backends.trt.cuda import Cuda
from runtime.backends.trt.elements import bytes_of, packed, unpacked
from runtime.errors import InputError

if TYPE_CHECKING:
    from runtime.backends.trt.session import Session

LEAST = 256
"""Bytes of the smallest block: TensorRT wants an address for an empty tensor too."""


class Block:
    """Memory that grows, by half at least, so that a cache which grows at every step moves seldom."""

    def __init__(self, cuda: Cuda, *, on_host: bool = False) -> None:
        """Nothing is allocated yet; `on_host` is page-locked memory."""
        self._take = cuda.allocate_host if on_host else cuda.allocate
        self._give_back = cuda.free_host if on_host else cuda.free
        self.address, self.size = 0, 0

    def at_least(self, size: int) -> bool:
        """Have so many bytes; True when the address is new. The old content is lost then, and its memory given back
        first, so that both are never held at once. Nothing may be running that uses it."""
        if self.size >= max(size, 1):
            return False
        wanted = max(size, self.size * 3 // 2, LEAST)
        self.close()
        self.address = self._take(wanted)
        self.size = wanted
        return True

    def host_bytes(self, size: int) -> npt.NDArray[np.uint8]:
        """The first bytes of a block on the host, as an array over them."""
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address))

    def close(self) -> None:
        """Give the memory back."""
        address, self.address, self.size = self.address, 0, 0
        if address:
            self._give_back(address)


class Scratch:
    """One block that all engines of a session work in, one after the other; as large as the neediest asks for."""

    def __init__(self, cuda: Cuda) -> None:
        self._block = Block(cuda)
        self._asked: Counter[int] = Counter()
        self.moves = 0
        """How often the address changed; who knows another number must tell its contexts."""

    @property
    def address(self) -> int:
        """Where it is; 0 when nobody needs any."""
        return self._block.address

    @property
    def size(self) -> int:
        """Bytes."""
        return self._block.size

    def join(self, size: int) -> None:
        """An engine that needs so many bytes is opened; nothing may be running."""
        self._asked[size] += 1
        if size > self._block.size:
            self._block.close()  # exactly the size: scratch does not grow step by step
            self.moves += 1
            self._block.at_least(size)

    def leave(self, size: int) -> None:
        """Such an engine is closed; with the last one the memory goes."""
        self._asked[size] -= 1
        if not +self._asked:
            self._block.close()
            self.moves += 1


class DeviceBuffer:
    """Memory that a caller holds; satisfies `runtime.backends.Buffer`.

    Given back when nobody holds it any more, or its engine is closed.
    """

    def __init__(self, session: "Session", elements: int, dtype: str) -> None:
        self.session, self.elements, self.dtype = session, elements, dtype
        self._address, self._end = session.take(max(bytes_of((elements,), dtype), LEAST), owner=self)

    @property
    def address(self) -> int:
        """On the device; InputError once its engine is closed."""
        if not self._end.alive:
            raise InputError("a buffer of an engine that was closed: open the engine again and ask it for another")
        return self._address

    def close(self) -> None:
        """Give the memory back at the session's next turn."""
        self._end()

    def view(self, shape: tuple[int, ...]) -> "DeviceView":
        """Its first elements as an array of this shape; InputError when it has not so many."""
        needed = int(np.prod(shape, dtype=np.int64))
        if needed > self.elements:
            raise InputError(f"view: expected at most {self.elements} elements, found {shape} ({needed})")
        return DeviceView(self, tuple(shape))


class DeviceView:
    """The first elements of a buffer as an array; satisfies `runtime.backends.View`."""

    def __init__(self, buffer: DeviceBuffer, shape: tuple[int, ...]) -> None:
        self.buffer, self._shape = buffer, shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""
        return self._shape

    @property
    def dtype(self) -> str:
        """Element type, as the plan calls it."""
        return self.buffer.dtype

    @property
    def address(self) -> int:
        """Of its first element, on the device."""
        return self.buffer.address

    def numpy(self) -> npt.NDArray[Any]:
        """A copy on the host."""
        content = self.buffer.session.read(self.address, bytes_of(self._shape, self.dtype))
        return unpacked(content, self._shape, self.dtype)

    def assign(self, array: npt.NDArray[Any]) -> None:
        """Write an array of the same shape and type there."""
        if array.shape != self._shape:
            raise InputError(f"assign: expected shape {self._shape}, found {array.shape}")
        self.buffer.session.write(self.address, packed(array, self.dtype, "assign"))

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy whole rows of its first axis inside it, one pair (target, source) after the other."""
        row = bytes_of(self._shape[1:], self.dtype)
        self.buffer.session.move(self.address, [(target * row, source * row) for target, source in moves], row)
