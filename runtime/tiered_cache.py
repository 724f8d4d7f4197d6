"""Memory before disk: what was seen lately costs no file, and what another process saw costs no vision."""

import numpy as np
import numpy.typing as npt

from runtime.disk_cache import DiskCache
from runtime.query_cache import Cache, QueryCache, Statistics


class TieredCache:
    """Looks in memory, then on the disk, and keeps what it is given in both."""

    def __init__(self, memory: QueryCache, disk: DiskCache) -> None:
        self._memory = memory
        self._disk = disk

    @property
    def hits(self) -> int:
        """Look-ups that either tier answered."""
        return self._memory.hits + self._disk.hits

    @property
    def misses(self) -> int:
        """Look-ups that neither answered; the disk is asked only after memory."""
        return self._disk.misses

    def get(self, key: str) -> npt.NDArray[np.float32] | None:
        """The array under `key` (read-only), or None."""
        array = self._memory.get(key)
        if array is None:
            array = self._disk.get(key)
            if array is not None:
                self._memory.put(key, array)
        return array

    def __contains__(self, key: str) -> bool:
        """Whether either tier has it; counts nothing."""
        return key in self._memory or key in self._disk

    def put(self, key: str, array: npt.NDArray[np.float32]) -> None:
        """Keep it in both."""
        self._memory.put(key, array)
        self._disk.put(key, array)

    def statistics(self) -> Statistics:
        """Both tiers, under "memory" and "disk"."""
        return self._memory.statistics() | self._disk.statistics()


def open_cache(max_bytes: int, disk: DiskCache | None) -> Cache:
    """The cache of a pipeline: `max_bytes` of memory, and the disk behind it where there is one."""
    memory = QueryCache(max_bytes)
    return memory if disk is None else TieredCache(memory, disk)
