"""How sure a number is: 95 % intervals for scores and for ratios of medians.

Scores of 0 and 1 get Wilson's interval, which stays honest near 100 % where others shrink to nothing; any other
score gets a bootstrap over items. Pipelines answer the same items, so what compares them resamples items, not samples
of each: item noise that both share cancels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""

RESAMPLES = 2000
"""Bootstrap resamples; the interval's own noise is then well below its width."""

Floats = npt.NDArray[np.float64]


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share, `right` of `n` (Wilson 1927)."""
    share, spread = right / n, Z_95**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_score(scores: Sequence[float], seed: int) -> dict[str, Any]:
    """Mean of item scores (0 to 1) with its 95 % interval: value, low, high, n and the interval's method."""
    n, value = len(scores), sum(scores) / len(scores)
    if all(score in (0.0, 1.0) for score in scores):
        low, high = wilson(round(sum(scores)), n)
        return {"value": value, "low": low, "high": high, "n": n, "method": "wilson"}
    low, high = _bootstrap(lambda rows: np.asarray(scores)[rows].mean(axis=1), n, seed)
    return {"value": value, "low": low, "high": high, "n": n, "method": "bootstrap"}


def mean_difference(scores: Sequence[float], reference: Sequence[float], seed: int) -> dict[str, float]:
    """Mean of `scores` minus mean of `reference` on the same items, with its paired 95 % bootstrap interval."""
    differences = np.asarray(scores, np.float64) - np.asarray(reference, np.float64)
    low, high = _bootstrap(lambda rows: differences[rows].mean(axis=1), len(differences), seed)
    return {"value": float(differences.mean()), "low": low, "high": high}


def paired_difference(scores: Sequence[float], reference: Sequence[float], seed: int) -> dict[str, Any]:
    """As `mean_difference`, but honest where no item differs: scores of 0 and 1 get Newcombe's interval.

    A bootstrap of items that all agree has no width, whatever their number; Newcombe (1998, method 10) builds on
    Wilson's intervals of both shares and on how they vary together. Keys: value, low, high, n and the method.
    """
    ours, theirs, n = list(scores), list(reference), len(scores)
    if len(theirs) != n:
        raise ValueError(f"paired scores differ in number: {n} and {len(theirs)}")
    if any(score not in (0.0, 1.0) for score in (*ours, *theirs)):
        return {**mean_difference(ours, theirs, seed), "n": n, "method": "bootstrap"}
    both = sum(a == b == 1 for a, b in zip(ours, theirs, strict=True))
    right, right_reference = round(sum(ours)), round(sum(theirs))
    neither = n - right - right_reference + both
    one, other = right / n, right_reference / n
    (low, high), (low_reference, high_reference) = wilson(right, n), wilson(right_reference, n)
    spread = right * (n - right) * right_reference * (n - right_reference)
    together = float(both * neither - (right - both) * (right_reference - both))
    together = max(0.0, together - n / 2) if together > 0 else together
    phi = together / math.sqrt(spread) if spread else 0.0
    down, up = (
        math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))
        for a, b in ((one - low, high_reference - other), (high - one, other - low_reference))
    )
    return {"value": one - other, "low": one - other - down, "high": one - other + up, "n": n, "method": "newcombe"}


def ratio_of_medians(samples: Sequence[float], reference: Sequence[float], seed: int) -> dict[str, float]:
    """median(samples) / median(reference), timed on the same calls, with its paired 95 % bootstrap interval."""
    ours, theirs = np.asarray(samples, np.float64), np.asarray(reference, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"paired samples differ in number: {len(ours)} and {len(theirs)}")

    def ratio(rows: npt.NDArray[np.int64]) -> Floats:
        return np.median(ours[rows], axis=1) / np.median(theirs[rows], axis=1)

    low, high = _bootstrap(ratio, len(ours), seed)
    return {"value": float(np.median(ours) / np.median(theirs)), "low": low, "high": high}


def percentile(samples: Sequence[float], percent: float) -> float:
    """Linear between neighbours, numpy's own definition."""
    return float(np.percentile(np.asarray(samples, np.float64), percent))


def _bootstrap(statistic: Callable[[npt.NDArray[np.int64]], Floats], n: int, seed: int) -> tuple[float, float]:
    """2.5 and 97.5 percentiles of a statistic of resampled item numbers, one row of them per resample."""
    rng = np.random.default_rng(seed)
    pieces = [statistic(rng.integers(0, n, (RESAMPLES // 20, n))) for _ in range(20)]  # bounded memory for large n
    low, high = np.percentile(np.concatenate(pieces), [2.5, 97.5])
    return float(low), float(high)
