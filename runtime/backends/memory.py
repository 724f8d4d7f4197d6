"""Which of an engine's errors say that memory ran out; onnxruntime has no class for it, only words."""

import re

from runtime.errors import OutOfMemory

WORDS = re.compile(r"failed to allocate memory|bad_alloc|bad allocation|out of memory|memory of \d+ is smaller", re.I)
"""onnxruntime's arena, C++ itself, CUDA and TensorRT."""
SIZE = re.compile(r"requested buffer of size (\d+)|smaller than requested bytes of (\d+)")


def raise_for_memory(error: Exception) -> None:
    """Raise OutOfMemory where that is what `error` says; another error is the caller's to raise again."""
    if WORDS.search(str(error)) is None:
        return
    size = SIZE.search(str(error))
    wanted = f" ({int(size[1] or size[2]):,} bytes more were asked for)" if size else ""
    raise OutOfMemory(
        f"there is not enough memory for this request{wanted}; ask for fewer images, beams or new tokens at once"
    ) from error
