"""Wall time by phase of one batch of requests."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

PHASES = ("preprocess", "vision", "qformer", "prefill", "decode")
"""Pixels and keys; vision tower; Q-Former with projection; first token; every further token."""


class Stopwatch:
    """Adds up time per phase; a phase that never ran (a cache hit) stays at 0."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._phases_ms = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the block to one of PHASES."""
        start = time.perf_counter()
        yield
        self._phases_ms[name] += (time.perf_counter() - start) * 1e3

    def timings_ms(self) -> dict[str, float]:
        """Every phase and `total`, the time since this object was made (milliseconds)."""
        return {**self._phases_ms, "total": (time.perf_counter() - self._start) * 1e3}
