"""Remembers what the vision side made of an image, so a seen image costs only decoding.

Other projects served one user's picture for another's because their keys collided (reference/runtime.md §0, fact 6).
Here a key is a full SHA-256 over fields that are each framed with name, type, shape and length, so no two different
inputs spell the same bytes; pixels, preprocessing and the bundle's digest are all in it.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from runtime.errors import InputError

Field: TypeAlias = str | Sequence[int] | npt.NDArray[Any]
"""What a key may be made of."""


Statistics: TypeAlias = dict[str, dict[str, int | str | None]]
"""Counters and sizes (bytes) by tier, ready for `json.dumps`."""


class Cache(Protocol):
    """Arrays by key, as `ImageEncoder` sees them; whoever implements it may forget any of them at any time."""

    @property
    def hits(self) -> int:
        """Look-ups that gave an array."""
        ...

    @property
    def misses(self) -> int:
        """Look-ups that gave none."""
        ...

    def get(self, key: str) -> npt.NDArray[np.float32] | None:
        """The array under `key` (read-only), or None; counts a hit or a miss."""
        ...

    def __contains__(self, key: str) -> bool:
        """Whether there seems to be an array under `key`; counts nothing and does not make it recent."""
        ...

    def put(self, key: str, array: npt.NDArray[np.float32]) -> None:
        """Keep a copy under `key`, if there is room for it."""
        ...

    def statistics(self) -> Statistics:
        """What was counted since this object was made."""
        ...


def cache_key(fields: Mapping[str, Field]) -> str:
    """Hex SHA-256 over the fields, each framed by the lengths of all its parts."""
    digest = hashlib.sha256()
    for name, value in fields.items():
        array = np.frombuffer(value.encode(), np.uint8) if isinstance(value, str) else np.asarray(value)
        kind = "text" if isinstance(value, str) else array.dtype.str
        for part in (name.encode(), kind.encode(), str(array.shape).encode(), np.ascontiguousarray(array).tobytes()):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


class QueryCache:
    """Arrays by key, bounded in bytes; the least recently used go first. Safe to share between threads."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes` bounds the arrays held; 0 keeps none."""
        if max_bytes < 0:
            raise InputError(f"cache_bytes: expected 0 or more bytes, found {max_bytes}")
        self.max_bytes = max_bytes
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        self._arrays: OrderedDict[str, npt.NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> npt.NDArray[np.float32] | None:
        """The array under `key` (read-only), or None; counts a hit or a miss."""
        with self._lock:
            array = self._arrays.get(key)
            if array is None:
                self.misses += 1
                return None
            self.hits += 1
            self._arrays.move_to_end(key)
            return array

    def __contains__(self, key: str) -> bool:
        """Whether there is an array under `key`; counts nothing and does not make it recent."""
        with self._lock:
            return key in self._arrays

    def put(self, key: str, array: npt.NDArray[np.float32]) -> None:
        """Keep a copy under `key`; an array larger than the whole bound is not kept."""
        if array.nbytes > self.max_bytes:
            return
        kept = array.copy()  # a view would keep the whole batch it was cut from alive
        kept.flags.writeable = False
        with self._lock:
            replaced = self._arrays.pop(key, None)
            self.bytes += kept.nbytes - (0 if replaced is None else replaced.nbytes)
            self._arrays[key] = kept
            while self.bytes > self.max_bytes:
                _, evicted = self._arrays.popitem(last=False)
                self.bytes -= evicted.nbytes
                self.evictions += 1

    def statistics(self) -> Statistics:
        """What was counted since this object was made, under "memory"."""
        with self._lock:
            counted: dict[str, int | str | None] = {
                "hits": self.hits,
                "misses": self.misses,
                "evictions": self.evictions,
                "entries": len(self._arrays),
                "bytes": self.bytes,
                "max_bytes": self.max_bytes,
            }
        return {"memory": counted}
