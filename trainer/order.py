"""Which rows a step sees: a function of seed and step alone, whatever was seen before and on how many ranks.

Nothing of it is stored, so a run resumes by its step. One data set is an endless sequence of shuffled epochs. A
mixture goes through each of its data sets in that way; which of them a place belongs to is drawn so that each block
of 1,024 places holds them in proportion to their weights.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from runtime.errors import InputError
from trainer.shuffle import shuffled

BLOCK = 1024
"""Places in which the sources of a mixture keep their proportions, to one place."""
MOST_SOURCES = 32
"""So that rounding never leaves the heaviest source without a place in a block."""


def rows_at(step: int, batch_size: int, row_count: int, seed: int) -> list[int]:
    """Row indices of one step: consecutive pieces of an endless sequence of shuffled epochs."""
    places = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    return _in_epochs(places, row_count, (seed,)).tolist()


def mixed_rows_at(step: int, batch_size: int, sizes: Sequence[int], weights: Sequence[float], seed: int) -> list[int]:
    """Row indices of one step in data sets of `sizes` laid end to end and mixed by `weights`.

    InputError for more than 32 data sets. A single one is `rows_at`.
    """
    if len(sizes) == 1:
        return rows_at(step, batch_size, sizes[0], seed)
    if len(sizes) > MOST_SOURCES:
        raise InputError(f"expected a mixture of at most {MOST_SOURCES} sources, found {len(sizes)}; join some of them")
    places = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    sources, turns = _turns(places, tuple(weights), seed)
    rows = np.empty_like(places)
    for source, size in enumerate(sizes):
        mine = sources == source
        rows[mine] = sum(sizes[:source]) + _in_epochs(turns[mine], size, (seed, source))
    return rows.tolist()


def _in_epochs(places: npt.NDArray[np.int64], count: int, key: tuple[int, ...]) -> npt.NDArray[np.int64]:
    rows = np.empty_like(places)
    for epoch in np.unique(places // count).tolist():
        inside = places // count == epoch
        rows[inside] = shuffled(places[inside] % count, count, (*key, epoch))
    return rows


def _turns(
    places: npt.NDArray[np.int64], weights: tuple[float, ...], seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The source of each place, and how many places before it were that source's."""
    sources, turns = np.empty_like(places), np.empty_like(places)
    for block in np.unique(places // BLOCK).tolist():
        inside = places // BLOCK == block
        of_block, turn_of = _block(block, weights, seed)
        sources[inside], turns[inside] = of_block[places[inside] % BLOCK], turn_of[places[inside] % BLOCK]
    return sources, turns


@lru_cache(maxsize=4)
def _block(block: int, weights: tuple[float, ...], seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """`_turns` of all places of one block."""
    before, after = _places_until(block, weights), _places_until(block + 1, weights)
    sources = np.repeat(np.arange(len(weights)), after - before)
    sources = np.random.default_rng([seed, block, len(weights)]).permutation(sources)
    turns = np.empty_like(sources)
    for source in range(len(weights)):
        mine = np.flatnonzero(sources == source)
        turns[mine] = before[source] + np.arange(len(mine))
    return sources, turns


def _places_until(block: int, weights: tuple[float, ...]) -> npt.NDArray[np.int64]:
    """Places of each source in all blocks before `block`: its share rounded down, and the rest for the heaviest."""
    shares = np.array(weights) / sum(weights)
    until = np.floor(block * BLOCK * shares).astype(np.int64)
    until[int(shares.argmax())] += block * BLOCK - until.sum()
    return until
