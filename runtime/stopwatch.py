"""Wall time by phase of one batch of requests."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

PHASES = ("preprocess", "vision", "qformer", "prefill", "decode")
"""Pixels and keys; vision tower; Q-Former with projection; first token; every further token."""

QUEUE = "queue"
"""A phase more where requests wait for each other: from the request to its place in a batch."""


class Stopwatch:
    """Adds up time per phase; a phase that never ran (a cache hit) stays at 0."""

    def __init__(self, phases: Sequence[str] = PHASES) -> None:
        self._start = time.perf_counter()
        self._phases_ms = dict.fromkeys(phases, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the block to one of the phases."""
        start = time.perf_counter()
        yield
        self.charge(name, time.perf_counter() - start)

    def charge(self, name: str, seconds: float) -> None:
        """Add to one of the phases."""
        self._phases_ms[name] += seconds * 1e3

    def add(self, other: Self) -> None:
        """Add all that another one's phases took."""
        for name, took_ms in other._phases_ms.items():
            self._phases_ms[name] += took_ms

    def timings_ms(self) -> dict[str, float]:
        """Every phase and `total`, the time since this object was made (milliseconds)."""
        return {**self._phases_ms, "total": (time.perf_counter() - self._start) * 1e3}
