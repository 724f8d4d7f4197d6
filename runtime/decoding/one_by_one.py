"""Greedy decoding and sampling: every row says one token a step, until all have ended.

Shape letters: B rows, L tokens so far, V vocabulary
"""

from collections.abc import Callable, Iterator

import numpy as np

from runtime.decoding.processors import probabilities
from runtime.decoding.task import Floats, Ids, Steps, Task, not_numbers
from runtime.errors import InputError

Choose = Callable[[Floats], Ids]
"""Scores [B, V] → the token [B] that each row says."""


def said_by_rows(logits_BV: Floats, steps: Steps, task: Task) -> Iterator[list[int | None]]:
    """One list a step: the token that each row says, None where it has ended. The end token is not said.

    A row that has ended is fed pads.
    """
    choose = Draw(task, len(logits_BV)) if task.decoding.do_sample else Likeliest(task)
    eos, pad = task.generation.eos_token_ids, task.generation.pad_token_id
    history_BL, given = task.given(len(logits_BV)), task.given(0).shape[1]
    ended_B = np.zeros(len(logits_BV), bool)
    for remaining in reversed(range(task.max_new_tokens)):
        ids_B = choose(task.processed(logits_BV, history_BL))
        ended_B |= np.isin(ids_B, eos)
        yield [None if ended else int(token) for token, ended in zip(ids_B, ended_B, strict=True)]
        history_BL = np.concatenate([history_BL, ids_B[:, None]], axis=1)
        if task.stops is not None:
            for row in np.flatnonzero(~ended_B):
                ended_B[row] = task.stops(history_BL[row, given:].tolist())
        if ended_B.all() or not remaining:
            return
        logits_BV = steps.step(np.where(ended_B, pad, ids_B))


class Likeliest:
    """Greedy."""

    def __init__(self, task: Task) -> None:
        self._graph = task.graph

    def __call__(self, scores_BV: Floats) -> Ids:
        """Tokens [B]."""
        return choose_greedy(scores_BV, self._graph)


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


def choose_greedy(scores_BV: Floats, graph: str) -> Ids:
    """The likeliest token of each row, as ids_B; CheckFailed naming the graph when the scores are not numbers."""
    ids_B: Ids = scores_BV.argmax(axis=-1)
    if np.isnan(np.take_along_axis(scores_BV, ids_B[:, None], axis=-1)).any():  # argmax stops at the first NaN
        raise not_numbers(graph)
    return ids_B
