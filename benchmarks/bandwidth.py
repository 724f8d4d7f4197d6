"""The least time in which this CPU can read so many bytes of weights: the floor of a token at batch 1.

A decoder reads each of its weights once a token. Whatever its kernels compute, it cannot be faster than memory.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

READERS: tuple[Callable[[npt.NDArray[Any]], Any], ...] = (
    np.max,
    np.bitwise_or.reduce,
    lambda part: np.add.reduce(part.view(np.float64)),
)
"""Ways to look at every byte once; the fastest of them counts, whichever that is on this CPU."""
PASSES = 8


def reading_ms(nbytes: int, threads: int) -> float:
    """Milliseconds to read an array of `nbytes` once with so many threads: the fastest pass of the fastest reader."""
    words = np.ones(nbytes // 8, np.int64)
    parts = np.array_split(words, threads)
    fastest = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for reader in READERS:
            for _ in range(PASSES):
                start = time.perf_counter()
                list(pool.map(reader, parts))
                fastest = min(fastest, time.perf_counter() - start)
    return 1000 * fastest
