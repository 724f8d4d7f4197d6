"""The greedy loop that every kind of language model shares: the likeliest token, until every row has ended.

Shape letters: B rows, V vocabulary
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from runtime.errors import CheckFailed, InputError
from runtime.manifest import Generation, Limits
from runtime.stopwatch import Stopwatch

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class TextDecoder(Protocol):
    """Prefix and prompt → tokens; one class per kind of language model."""

    def generate(
        self, prefix_BQD: Floats, prompts: Sequence[Sequence[int]], max_new_tokens: int, watch: Stopwatch
    ) -> list[tuple[int, ...]]:
        """Generated ids of each row, the end token excluded.

        A row stops at any end token, or after `max_new_tokens`.

        Raises:
            InputError: beyond the bundle's limits (new tokens, positions).
        """
        ...


def choose_greedy(logits_BV: Floats, graph: str) -> Ids:
    """The likeliest token of each row, as ids_B; CheckFailed naming the graph when the scores are not numbers."""
    ids_B: Ids = logits_BV.argmax(axis=-1)
    if np.isnan(np.take_along_axis(logits_BV, ids_B[:, None], axis=-1)).any():  # argmax stops at the first NaN
        raise CheckFailed(f"graph '{graph}': expected numbers, found NaN; check the bundle here: qforge verify")
    return ids_B


def until_ended(
    ids_B: Ids, following: Callable[[Ids], Ids], generation: Generation, max_new_tokens: int
) -> list[tuple[int, ...]]:
    """Rows of tokens that begin with `ids_B`, each up to its end token, which is left out.

    `following` gets the last tokens [B, 1] and gives the next ones [B]; a row that has ended is fed pads.
    """
    answers: list[list[int]] = [[] for _ in ids_B]
    ended_B = np.zeros(len(ids_B), bool)
    for remaining in reversed(range(max_new_tokens)):
        ended_B |= np.isin(ids_B, generation.eos_token_ids)
        for row in np.flatnonzero(~ended_B):
            answers[row].append(int(ids_B[row]))
        if ended_B.all() or not remaining:
            break
        ids_B = following(np.where(ended_B, generation.pad_token_id, ids_B)[:, None])
    return [tuple(ids) for ids in answers]


def check_new_tokens(max_new_tokens: int, limits: Limits) -> None:
    """InputError when a request asks for more tokens than the bundle can say, or for none."""
    if not 1 <= max_new_tokens <= limits.max_new_tokens:
        raise InputError(
            f"max_new_tokens: expected 1 to {limits.max_new_tokens} (this bundle's limit), found {max_new_tokens}"
        )
