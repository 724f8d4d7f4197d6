"""What is done to the scores of the next token before one is chosen: pure functions, equal to transformers' classes.

Shape letters: B rows, L tokens so far, N tokens of an n-gram, V vocabulary
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


def penalise_repetition(scores_BV: Floats, history_BL: Ids, penalty: float) -> Floats:
    """Scores of tokens in the history, divided by the penalty where positive and multiplied where negative."""
    old_BL = np.take_along_axis(scores_BV, history_BL, axis=1)
    factor = np.float32(penalty)
    penalised_BV = scores_BV.copy()
    np.put_along_axis(penalised_BV, history_BL, np.where(old_BL < 0, old_BL * factor, old_BL / factor), axis=1)
    return penalised_BV


def ban_repeated_ngrams(scores_BV: Floats, history_BL: Ids, size: int) -> Floats:
    """Scores without the tokens that would complete an n-gram of the history once more."""
    length = history_BL.shape[1]
    if length < size:
        return scores_BV
    windows_BWN = np.lib.stride_tricks.sliding_window_view(history_BL, size, axis=1)
    begun_BN = history_BL[:, length + 1 - size :]
    again_BW = (windows_BWN[..., :-1] == begun_BN[:, None]).all(axis=-1)
    rows, places = np.nonzero(again_BW)
    banned_BV = scores_BV.copy()
    banned_BV[rows, windows_BWN[rows, places, -1]] = -np.inf
    return banned_BV


def ban(scores_BV: Floats, ids: Sequence[int]) -> Floats:
    """Scores without these tokens."""
    banned_BV = scores_BV.copy()
    banned_BV[:, list(ids)] = -np.inf
    return banned_BV


def keep_top_k(scores_BV: Floats, count: int) -> Floats:
    """Scores of the likeliest tokens, and of those as likely as the last of them."""
    count = min(count, scores_BV.shape[1])
    least_B1 = np.partition(scores_BV, -count, axis=1)[:, -count, None]
    return np.where(scores_BV < least_B1, np.float32(-np.inf), scores_BV)


def keep_top_p(scores_BV: Floats, mass: float) -> Floats:
    """Scores of the fewest likeliest tokens that together have this probability."""
    order_BV = np.argsort(scores_BV, axis=1, kind="stable")
    # Summed in double and kept in single precision, as PyTorch does on a CPU: the border then lies where its lies.
    sums_BV = probabilities(np.take_along_axis(scores_BV, order_BV, axis=1)).cumsum(axis=1, dtype=np.float64)
    drop_BV = sums_BV.astype(np.float32) <= np.float32(1 - mass)
    drop_BV[:, -1] = False
    kept_BV = scores_BV.copy()
    rows, places = np.nonzero(drop_BV)
    kept_BV[rows, order_BV[rows, places]] = -np.inf
    return kept_BV


def probabilities(scores_BV: Floats) -> Floats:
    """Softmax; a banned token has probability 0."""
    weights_BV = np.exp(scores_BV - scores_BV.max(axis=1, keepdims=True))
    probabilities_BV: Floats = weights_BV / weights_BV.sum(axis=1, keepdims=True)
    return probabilities_BV


def log_probabilities(scores_BV: Floats) -> Floats:
    """Logarithm of the softmax."""
    shifted_BV = scores_BV - scores_BV.max(axis=1, keepdims=True)
    logs_BV: Floats = shifted_BV - np.log(np.exp(shifted_BV).sum(axis=1, keepdims=True))
    return logs_BV
