"""A scheduler over tiny language models of OPT's and T5's shape; an image is the number of a prefix."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.batching.job import Job
from runtime.batching.scheduler import Scheduler
from runtime.decoding import GREEDY, Decoding
from runtime.decoding.stop_strings import StopStrings
from runtime.decoding.task import Floats, Stops
from runtime.stopwatch import PHASES, QUEUE, Stopwatch
from tests.runtime.decoding.family import NEW_TOKENS, QUERIES, Family

WAIT_S = 20.0
"""Longer than anything takes here; who waits so long waits for ever."""


class NumberedImages:
    """An encoder whose prefix lies under the number that all pixels have; satisfies `ImageEncoder` as far as asked."""

    def __init__(self, prefix_BQD: Floats) -> None:
        self._prefix_BQD = prefix_BQD
        self.batches: list[list[int]] = []
        self.broken: int | None = None
        """An image that fails whatever batch it is in."""

    def encode(self, pixels_BCHW: Floats, questions: Sequence[Any], watch: Stopwatch) -> Floats:
        with watch.phase("vision"):
            numbers = [int(number) for number in pixels_BCHW[:, 0, 0, 0]]
            self.batches.append(numbers)
            if self.broken in numbers:
                raise MemoryError(f"image {self.broken}")
            return self._prefix_BQD[numbers]


class Workshop:
    """Jobs by the row of the family that they ask, and what the family says of it alone."""

    def __init__(self, family: Family, max_batch: int, max_wait_ms: float) -> None:
        self.family = family
        self.images = NumberedImages(family.prefix_BQD)
        self.scheduler = Scheduler(self.images, family.decoder, max_batch, max_wait_ms)  # type: ignore[arg-type]

    def job(self, row: int, decoding: Decoding = GREEDY, *, side: int = 2, streamed: bool = False) -> Job:
        prompt = self.family.prompts[row]
        task = self.family.decoder.task(QUERIES, [prompt], NEW_TOKENS, decoding, self._stops(decoding))
        pixels_CHW = np.full((3, side, side), row, np.float32)
        return Job(pixels_CHW, side, None, prompt, task, Stopwatch((QUEUE, *PHASES)), streamed=streamed)

    def ask(self, row: int, decoding: Decoding = GREEDY, **how: Any) -> Job:
        """Submit it."""
        return self.scheduler.submit(lambda: self.job(row, decoding, **how))

    def alone(self, row: int, decoding: Decoding = GREEDY) -> list[tuple[int, ...]]:
        """The judge: one call of `generate`."""
        family = self.family
        return family.decoder.generate(
            family.prefix_BQD[[row]], [family.prompts[row]], NEW_TOKENS, Stopwatch(), decoding, self._stops(decoding)
        )

    def long_rows(self, count: int) -> list[int]:
        """Rows whose greedy text is as long as it may be."""
        found = [row for row in range(len(self.family.prompts)) if len(self.alone(row)[0]) == NEW_TOKENS]
        assert len(found) >= count
        return found[:count]

    def _stops(self, decoding: Decoding) -> Stops | None:
        return StopStrings(self.family.text_tokenizer, decoding.stop_strings) if decoding.stop_strings else None
