"""What every decode loop is given: the rules of one call, and a language model that goes on token by token.

Shape letters: B rows, L tokens so far, V vocabulary
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from runtime.decoding import Decoding
from runtime.decoding import processors as rules
from runtime.errors import CheckFailed
from runtime.manifest import Generation

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Stops = Callable[[Sequence[int]], bool]
"""Whether the tokens said so far complete a stop string."""


class Steps(Protocol):
    """A batch of rows inside a language model: what they have read and said is in its cache."""

    def step(self, ids_B: Ids) -> Floats:
        """Each row says one token; scores [B, V] of the next one."""
        ...

    def select(self, rows_B: Ids) -> None:
        """Go on with these of the present rows, in this order; a row may come several times, or not at all."""
        ...

    def can_join(self, other: Self) -> bool:
        """Whether these rows and those of `other` can go on in one run of the graph."""
        ...

    def join(self, other: Self) -> None:
        """Take the rows of `other`, which is of no use afterwards, behind the present ones; ValueError if they cannot.

        The scores of each row's next token stay the caller's to put together.
        """
        ...


class Search(Protocol):
    """What one request looks for; its rows may share a batch with those of others.

    A new one has as many rows as `Decoding.width` has for each of its prompts.
    """

    @property
    def rows(self) -> int:
        """How many rows go on; 0 when all is said."""
        ...

    def advance(self, scores_BV: Floats) -> tuple[Ids, Ids]:
        """Scores of its rows → (the rows that go on, the token that each of them says).

        A row may go on several times, or not at all. None go on when all is said.
        """
        ...

    def texts(self) -> list[tuple[int, ...]]:
        """What was said, without end tokens: `num_return_sequences` texts of each prompt, one after the other."""
        ...


@dataclass(frozen=True)
class Task:
    """The rules of one call."""

    decoding: Decoding
    generation: Generation
    max_new_tokens: int
    graph: str
    """Which graph gives the scores; named when they are not numbers."""
    stops: Stops | None = None

    def given(self, rows: int) -> Ids:
        """Tokens [B, L] that penalties count before anything is said.

        Prompts reach the language model as embeddings, so transformers counts nothing of them either: only the token
        that an encoder-decoder begins with.
        """
        start = self.generation.start_token_id
        return np.full((rows, 0 if start is None else 1), 0 if start is None else start, np.int64)

    def processed(self, scores_BV: Floats, history_BL: Ids) -> Floats:
        """Scores after the penalties and bans, in transformers' order; `history_BL` begins with `given`."""
        decoding = self.decoding
        if decoding.repetition_penalty != 1.0:
            scores_BV = rules.penalise_repetition(scores_BV, history_BL, decoding.repetition_penalty)
        if decoding.no_repeat_ngram_size:
            scores_BV = rules.ban_repeated_ngrams(scores_BV, history_BL, decoding.no_repeat_ngram_size)
        said = history_BL.shape[1] - self.given(0).shape[1]
        if said < decoding.min_new_tokens:
            scores_BV = rules.ban(scores_BV, self.generation.eos_token_ids)
        return scores_BV

    def warped(self, scores_BV: Floats) -> Floats:
        """Processed scores as they are drawn from, in transformers' order; what is never drawn is -inf."""
        decoding = self.decoding
        if decoding.temperature != 1.0:
            scores_BV = scores_BV / np.float32(decoding.temperature)
        if decoding.top_k:
            scores_BV = rules.keep_top_k(scores_BV, decoding.top_k)
        if decoding.top_p < 1.0:
            scores_BV = rules.keep_top_p(scores_BV, decoding.top_p)
        return scores_BV

    def checked(self, scores_BV: Floats) -> Floats:
        """The same scores; CheckFailed naming the graph when they are not numbers."""
        if np.isnan(scores_BV).any():
            raise not_numbers(self.graph)
        return scores_BV


def not_numbers(graph: str) -> CheckFailed:
    """What a graph that gives NaN is told of."""
    return CheckFailed(f"graph '{graph}': expected numbers, found NaN; check the bundle here: qforge verify")
