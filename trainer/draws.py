"""All randomness of one optimiser step, as a function of seed, stage, step and a row's place in the global batch.

Nothing depends on how many processes share the batch: row 17 of step 300 gets the same caption, crop and split on one
process and on sixteen, so a run that is resumed on another number of processes goes on with the same draws. Dropout is
the exception, it comes from torch's own generator (seeded by seed, stage, step, process and part).
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class StepDraws:
    """The draws of one process in one step."""

    key: tuple[int, ...]
    """Seed, number of the stage, step (0-based)."""
    first: int
    """Place of this process' first row in the global batch."""
    rows: int
    """Rows of the global batch, over all processes."""
    places: tuple[int, ...] | None = None
    """Rows of this process it was narrowed to, by `at`; None: all of them."""

    def row(self, place: int, purpose: str = "text") -> np.random.Generator:
        """The generator of local row `place`; each `purpose` (text, image …) has one of its own."""
        return np.random.default_rng([*self.key, 1, self.place(place), _number(purpose)])

    def place(self, place: int) -> int:
        """Place in the global batch of local row `place`."""
        return self.first + (place if self.places is None else self.places[place])

    def shared(self, purpose: str) -> np.random.Generator:
        """A generator that is the same on every process, for what is drawn over the whole batch (negatives)."""
        return np.random.default_rng([*self.key, 0, _number(purpose)])

    def at(self, places: Sequence[int]) -> "StepDraws":
        """These draws for some of the local rows: row 0 of the result is row `places[0]` here."""
        chosen = tuple(place if self.places is None else self.places[place] for place in places)
        return replace(self, places=chosen)

    def torch_seed(self, process: int, part: int) -> int:
        """Seed of torch's generator (dropout) for one part of the rows of process `process`."""
        return int(np.random.SeedSequence([*self.key, 2, process, part]).generate_state(1)[0])


def _number(purpose: str) -> int:
    return zlib.crc32(purpose.encode())
