"""The one decode loop: searches of one call, or of many callers, whose rows run together in one language model.

    batch = Batch(scores_BV, steps, [RowSearch(task)], np.zeros(beams, np.int64))
    while batch.searches:
        batch.step()

A row leaves as soon as its search wants it no more, and rows of another batch may join between two steps.

Shape letters: B rows, R rows that searches begin with, V vocabulary
"""

from collections.abc import Sequence
from typing import Generic, Self, TypeVar

import numpy as np

from runtime.decoding.beams import RowSearch
from runtime.decoding.one_by_one import OneByOne
from runtime.decoding.task import Floats, Ids, Search, Steps, Task

S = TypeVar("S", bound=Search)


class Batch(Generic[S]):
    """Searches that have not ended, and their rows, side by side in the same order."""

    def __init__(self, scores_BV: Floats, steps: Steps, searches: Sequence[S], prompts_R: Ids) -> None:
        """Say the first token of every search.

        `scores_BV` and `steps` are what a prefill gave; `prompts_R` is the row of it that each search's rows begin as.
        """
        self._steps = steps
        self.searches = list(searches)
        """Those that go on."""
        self._ids_B = self._advance(scores_BV[prompts_R], prompts_R)

    @property
    def rows(self) -> int:
        """Sequences that run."""
        return sum(search.rows for search in self.searches)

    def step(self) -> None:
        """One token more of every search."""
        self.advance(self.scores())

    def scores(self) -> Floats:
        """Run the language model; scores [B, V] for `advance`. When it fails, nothing has changed."""
        return self._steps.step(self._ids_B)

    def advance(self, scores_BV: Floats) -> None:
        """Every search says its token; those that end leave."""
        self._ids_B = self._advance(scores_BV, np.arange(len(scores_BV)))

    def can_join(self, other: Self) -> bool:
        """Whether the language model can run the rows of both at once."""
        return self._steps.can_join(other._steps)

    def join(self, other: Self) -> None:
        """Take the searches of another batch, which is of no use afterwards."""
        self._steps.join(other._steps)
        self.searches += other.searches
        self._ids_B = np.concatenate([self._ids_B, other._ids_B])

    def drop_last(self) -> S:
        """Let go of the search that came last, and return it."""
        last = self.searches.pop()
        kept_B = np.arange(self.rows)
        if self.searches:
            self._steps.select(kept_B)
        self._ids_B = self._ids_B[kept_B]
        return last

    def _advance(self, scores_RV: Floats, rows_R: Ids) -> Ids:
        """Give every search its scores, and return the tokens that are said.

        `rows_R` is the row of `steps` that each of the scores' rows is.
        """
        first, origins, ids = 0, list[Ids](), list[Ids]()
        for search in self.searches:
            own = slice(first, first + search.rows)
            first = own.stop
            kept_B, ids_B = search.advance(scores_RV[own])
            origins.append(rows_R[own][kept_B])
            ids.append(ids_B)
        self.searches = [search for search, ids_B in zip(self.searches, ids, strict=True) if len(ids_B)]
        if self.searches:
            self._steps.select(np.concatenate(origins))
        return np.concatenate(ids)


def searches_of(task: Task, prompts: int) -> list[Search]:
    """What one call looks for: a search per prompt where beams are followed, else one for all."""
    if task.decoding.num_beams > 1:
        return [RowSearch(task) for _ in range(prompts)]
    return [OneByOne(task, prompts * task.decoding.num_return_sequences)]
