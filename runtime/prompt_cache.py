"""Remembers keys and values of image and prompt, so that what was read before is not read again.

The same caption prompt about the same image, the next question about it, the next turn of a chat: each begins with
positions that a decoder-only model has computed already. An entry is found by the SHA-256 of the prefix and compared
token by token; it holds all positions of one row, of which a request may use the first ones.

Shape letters: Q queries, D language width, h heads, P cached positions, d head width
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends import Arrays
from runtime.errors import InputError
from runtime.query_cache import Statistics, cache_key

Key = tuple[str, tuple[int, ...]]
"""Digest of a prefix, and the tokens behind it."""


class PromptCache:
    """Caches [1, h, P, d] of single rows, bounded in bytes; the least recently used go first. Safe between threads."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes` bounds the arrays held; 0 keeps none."""
        if max_bytes < 0:
            raise InputError(f"cache_bytes: expected 0 or more bytes, found {max_bytes}")
        self.max_bytes = max_bytes
        self.bytes = self.hits = self.misses = self.evictions = 0
        self._entries: OrderedDict[Key, Arrays] = OrderedDict()
        self._of_prefix: dict[str, dict[Key, None]] = {}
        self._lock = threading.Lock()

    def longest(self, prefix_QD: npt.NDArray[np.float32], ids: Sequence[int]) -> Arrays | None:
        """The longest known head of prefix and prompt, without the last position of all; counts a hit or a miss.

        The last position is always left to the graph, which gives the scores for it.
        """
        if not self.max_bytes:
            return None
        with self._lock:
            keys = self._of_prefix.get(_digest(prefix_QD), {})
            best = max(keys, key=lambda key: _common(key[1], ids), default=None)
            if best is None:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(best)
            arrays = self._entries[best]
        known = min(len(prefix_QD) + _common(best[1], ids), len(prefix_QD) + len(ids) - 1)
        return {name: array[:, :, :known] for name, array in arrays.items()}

    def put(self, prefix_QD: npt.NDArray[np.float32], ids: Sequence[int], arrays: Mapping[str, Any]) -> None:
        """Keep the positions of prefix and prompt; whoever calls gives the arrays away.

        What is only a head of another entry is not kept beside it; nor is what is larger than the whole bound.
        """
        digest, kept = _digest(prefix_QD), dict(arrays)
        size = sum(array.nbytes for array in kept.values())
        if size > self.max_bytes:
            return
        for array in kept.values():
            array.flags.writeable = False
        key = (digest, tuple(ids))
        with self._lock:
            others = list(self._of_prefix.get(digest, ()))
            longer = next((old for old in others if old[1][: len(ids)] == key[1]), None)
            if longer is not None:
                self._entries.move_to_end(longer)
                return
            for old in others:
                if key[1][: len(old[1])] == old[1]:
                    self._drop(old)
            self._entries[key] = kept
            self._of_prefix.setdefault(digest, {})[key] = None
            self.bytes += size
            while self.bytes > self.max_bytes:
                self._drop(next(iter(self._entries)))
                self.evictions += 1

    def statistics(self) -> Statistics:
        """What was counted since this object was made, under "prompts"."""
        with self._lock:
            counted: dict[str, int | str | None] = {
                "hits": self.hits,
                "misses": self.misses,
                "evictions": self.evictions,
                "entries": len(self._entries),
                "bytes": self.bytes,
                "max_bytes": self.max_bytes,
            }
        return {"prompts": counted}

    def _drop(self, key: Key) -> None:
        self.bytes -= sum(array.nbytes for array in self._entries.pop(key).values())
        others = self._of_prefix[key[0]]
        del others[key]
        if not others:
            del self._of_prefix[key[0]]


def _digest(prefix_QD: npt.NDArray[np.float32]) -> str:
    return cache_key({"prefix": prefix_QD})


def _common(known: Sequence[int], ids: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next(
        (place for place, (a, b) in enumerate(zip(known, ids, strict=False)) if a != b), min(len(known), len(ids))
    )
