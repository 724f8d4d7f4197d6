"""Greedy decoding and sampling: every row says one token a step, and leaves when its text has ended.

Shape letters: B rows, L tokens so far, V vocabulary
"""

import numpy as np

from runtime.decoding.processors import probabilities
from runtime.decoding.task import Floats, Ids, Task, not_numbers
from runtime.errors import InputError


class OneByOne:
    """Texts that are said token by token; satisfies `runtime.decoding.task.Search`."""

    def __init__(self, task: Task, rows: int) -> None:
        """`rows` are all sequences of all prompts."""
        self._task = task
        self._choose = Draw(task, rows) if task.decoding.do_sample else Likeliest(task)
        self._ends = np.array(task.generation.eos_token_ids, np.int64)
        self._history_BL = task.given(rows)
        self._given = self._history_BL.shape[1]
        self._texts: list[list[int]] = [[] for _ in range(rows)]
        self._going = np.arange(rows)
        """Which text each of the present rows says."""
        self._remaining = task.max_new_tokens

    @property
    def rows(self) -> int:
        """Texts that have not ended."""
        return len(self._going)

    def advance(self, scores_BV: Floats) -> tuple[Ids, Ids]:
        """One token more of every text; see `Search`. The end token is not said."""
        ids_B = self._choose(self._task.processed(scores_BV, self._history_BL))
        over_B = (ids_B[:, None] == self._ends).any(axis=1)
        for text, token, over in zip(self._going, ids_B, over_B, strict=True):
            if not over:
                self._texts[text].append(int(token))
        self._history_BL = np.concatenate([self._history_BL, ids_B[:, None]], axis=1)
        if self._task.stops is not None:
            for row in np.flatnonzero(~over_B):
                over_B[row] = self._task.stops(self._history_BL[row, self._given :].tolist())
        self._remaining -= 1
        kept_B = np.flatnonzero(~over_B) if self._remaining else np.arange(0)
        if len(kept_B) < len(ids_B):
            self._going, self._history_BL = self._going[kept_B], self._history_BL[kept_B]
            self._choose.keep(kept_B)
        return kept_B, ids_B[kept_B]

    def texts(self) -> list[tuple[int, ...]]:
        """What was said so far, of every row that there was."""
        return [tuple(text) for text in self._texts]


class Likeliest:
    """Greedy."""

    def __init__(self, task: Task) -> None:
        self._graph = task.graph

    def __call__(self, scores_BV: Floats) -> Ids:
        """Tokens [B]."""
        return choose_greedy(scores_BV, self._graph)

    def keep(self, rows_B: Ids) -> None:
        """Nothing is known of single rows."""


class Draw:
    """Each row draws from a random stream of its own, so that its text is the same in every batch.

    The stream is told by the seed and by which of an image's sequences the row is, not by the row's place.
    """

    def __init__(self, task: Task, rows: int) -> None:
        self._task = task
        seed, sequences = task.decoding.seed, task.decoding.num_return_sequences
        self._streams = [
            np.random.default_rng(None if seed is None else [seed, row % sequences]) for row in range(rows)
        ]

    def __call__(self, scores_BV: Floats) -> Ids:
        """Tokens [B]; one random number per row and step."""
        if np.isneginf(self._task.checked(scores_BV).max(axis=1)).any():
            raise InputError(
                "no_repeat_ngram_size, min_new_tokens: together they ban every token of the vocabulary; lower one"
            )
        sums_BV = probabilities(self._task.warped(scores_BV)).cumsum(axis=1, dtype=np.float64)
        # A number in [0, 1) times the sum is below the sum, so the first place above it has a probability above 0.
        places = [
            np.searchsorted(sums, stream.random() * sums[-1], side="right")
            for sums, stream in zip(sums_BV, self._streams, strict=True)
        ]
        return np.array(places, np.int64)

    def keep(self, rows_B: Ids) -> None:
        """Go on with these rows' streams."""
        self._streams = [self._streams[row] for row in rows_B]


def choose_greedy(scores_BV: Floats, graph: str) -> Ids:
    """The likeliest token of each row, as ids_B; CheckFailed naming the graph when the scores are not numbers."""
    ids_B: Ids = scores_BV.argmax(axis=-1)
    if np.isnan(np.take_along_axis(scores_BV, ids_B[:, None], axis=-1)).any():  # argmax stops at the first NaN
        raise not_numbers(graph)
    return ids_B
