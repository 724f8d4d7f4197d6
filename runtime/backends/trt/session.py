"""What the engines of one process share on a GPU: one stream, one scratch block, one turn at a time.

The graphs of a bundle run one after the other anyway, so one stream loses nothing, and sharing scratch memory is safe
only like this. Threads may call any engine; they wait for each other here.
"""

import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import numpy as np
import numpy.typing as npt

from runtime.backends.trt.cuda import Cuda, CudaRuntime, Gpu
from runtime.backends.trt.memory import Block, DeviceBuffer, Scratch


class Session:
    """One GPU as this process uses it."""

    def __init__(self, cuda: Cuda) -> None:
        cuda.use()
        self.cuda = cuda
        self.gpu: Gpu = cuda.gpu()
        self.stream = cuda.stream()
        self.scratch = Scratch(cuda)
        self._turn = threading.RLock()
        self._staging = Block(cuda, on_host=True)
        self._dropped: deque[int] = deque()
        """Memory of buffers that nobody holds any more. They may be dropped at any moment, in the middle of a capture
        too, which giving memory back would break; so that waits for the next turn."""

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Nothing else runs on this GPU inside; the GPU is this thread's device."""
        with self._turn:
            self.cuda.use()
            self.free_dropped()
            yield

    def free_dropped(self) -> None:
        """Give back the memory of buffers that nobody holds any more; within a turn."""
        while self._dropped:
            self.cuda.free(self._dropped.popleft())

    def take(self, size: int, owner: DeviceBuffer) -> tuple[int, "weakref.finalize[..., DeviceBuffer]"]:
        """Device memory (bytes), and what gives it back; that happens by itself when `owner` is gone."""
        with self.turn():
            address = self.cuda.allocate(size)
        return address, weakref.finalize(owner, self._dropped.append, address)

    def read(self, address: int, size: int) -> npt.NDArray[np.uint8]:
        """A copy of device memory."""
        with self.turn():
            self._staging.at_least(size)
            self.cuda.copy(self._staging.address, address, size, self.stream)
            self.cuda.synchronize(self.stream)
            return self._staging.host_bytes(size).copy()

    def write(self, address: int, content: npt.NDArray[np.uint8]) -> None:
        """Set device memory."""
        with self.turn():
            self._staging.at_least(content.nbytes)
            self._staging.host_bytes(content.nbytes)[:] = content
            self.cuda.copy(address, self._staging.address, content.nbytes, self.stream)
            self.cuda.synchronize(self.stream)

    def move(self, address: int, moves: Sequence[tuple[int, int]], size: int) -> None:
        """Copy blocks of so many bytes on the device, one pair of offsets (target, source) after the other."""
        with self.turn():
            for target, source in moves:
                self.cuda.copy(address + target, address + source, size, self.stream)


@cache
def session_here(ordinal: int = 0) -> Session:
    """The session of a GPU, the same for the whole process; BackendUnavailable without a GPU or its bindings."""
    return Session(CudaRuntime(ordinal))
