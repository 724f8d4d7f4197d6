"""Beam search: the same hypotheses, scores and stopping rules as transformers' `_beam_search`, row by row.

Every row has a search of its own, so no row's text depends on its neighbours.

Shape letters: K beams, C candidates, L tokens so far, V vocabulary
"""

import numpy as np

from runtime.decoding.processors import log_probabilities
from runtime.decoding.task import Floats, Ids, Task

IMPOSSIBLE = np.float32(-1e9)
"""Added to the score of what must not be chosen, as in transformers."""


class RowSearch:
    """The hypotheses of one prompt; satisfies `runtime.decoding.task.Search`."""

    def __init__(self, task: Task) -> None:
        self._task, beams = task, task.decoding.num_beams
        self._running_KL = task.given(beams)
        """Tokens of the hypotheses that go on, `Task.given` before them."""
        self._ended = False
        """Whether nothing can be won by going on."""
        self._given = self._running_KL.shape[1]
        self._scores_K = np.full(beams, IMPOSSIBLE)
        self._scores_K[0] = 0  # all beams begin alike: without this they would all say the same
        self._finished: list[tuple[np.float32, Ids]] = []
        """At most K, best first."""
        self._improvable = True

    @property
    def rows(self) -> int:
        """All beams, until the search ends."""
        return 0 if self._ended else len(self._running_KL)

    def advance(self, scores_KV: Floats) -> tuple[Ids, Ids]:
        """One token more; the beam [K] that each hypothesis which goes on continues, and its token. See `Search`."""
        log_KV = log_probabilities(self._task.checked(scores_KV))
        decoding, beams = self._task.decoding, len(log_KV)
        totals_KV = self._task.processed(log_KV, self._running_KL) + self._scores_K[:, None]
        scores_C, origins_C, candidates_CL = self._candidates(totals_KV)
        said = candidates_CL.shape[1] - self._given
        over_C = self._over(candidates_CL, said)

        going_C = scores_C + np.where(over_C, IMPOSSIBLE, np.float32(0))
        going_K = np.argsort(-going_C, kind="stable")[:beams]
        full = len(self._finished) == beams and decoding.early_stopping is True
        if self._improvable and not full:
            ranked = scores_C / np.float32(said**decoding.length_penalty)
            # Candidates beyond the first K are there only so that K can go on; they are never final.
            new = [(ranked[place], candidates_CL[place, self._given :]) for place in np.flatnonzero(over_C[:beams])]
            self._finished = sorted([*self._finished, *new], key=lambda scored: -scored[0])[:beams]
        self._running_KL, self._scores_K = candidates_CL[going_K], going_C[going_K]
        self._improvable = self._improvable and self._can_improve(said)
        full = len(self._finished) == beams and decoding.early_stopping is True
        self._ended = bool(not self._improvable or full or over_C.all())
        if self._ended:
            return np.arange(0), np.arange(0)
        return origins_C[going_K], self._running_KL[:, -1]

    def texts(self) -> list[tuple[int, ...]]:
        """The best sequences, without the end token."""
        eos = self._task.generation.eos_token_ids
        best = [ids.tolist() for _, ids in self._finished[: self._task.decoding.num_return_sequences]]
        return [tuple(ids[:-1] if ids[-1] in eos else ids) for ids in best]

    def _candidates(self, totals_KV: Floats) -> tuple[Floats, Ids, Ids]:
        """The best continuations of all beams: scores [C], the beam [C] each continues, tokens [C, L]."""
        beams, vocabulary = totals_KV.shape
        count = min(max(2, 1 + len(self._task.generation.eos_token_ids)) * beams, totals_KV.size)
        flat = totals_KV.reshape(-1)
        best = np.argpartition(-flat, count - 1)[:count]
        best = best[np.lexsort((best, -flat[best]))]
        origins_C, ids_C = best // vocabulary, best % vocabulary
        return flat[best], origins_C, np.concatenate([self._running_KL[origins_C], ids_C[:, None]], axis=1)

    def _over(self, candidates_CL: Ids, said: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Which candidates are whole texts."""
        if said >= self._task.max_new_tokens:
            return np.ones(len(candidates_CL), bool)
        over_C = np.isin(candidates_CL[:, -1], self._task.generation.eos_token_ids)
        if self._task.stops is not None:
            texts = candidates_CL[:, self._given :].tolist()
            over_C |= np.array([self._task.stops(ids) for ids in texts], bool)
        return over_C

    def _can_improve(self, said: int) -> bool:
        """Whether a hypothesis that goes on may still beat the worst finished one, by transformers' estimate."""
        decoding = self._task.decoding
        if len(self._finished) < decoding.num_beams:
            return True
        longest = decoding.early_stopping == "never" and decoding.length_penalty > 0
        length = self._task.max_new_tokens if longest else said
        best = self._scores_K[0] / np.float32(length**decoding.length_penalty)
        return bool(best > self._finished[-1][0])
