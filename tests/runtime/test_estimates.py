"""Intervals against values worked out by hand or by their definition."""

import numpy as np
import pytest

from runtime.estimates import mean_difference, mean_score, paired_difference, percentile, ratio_of_medians, wilson


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (10, 10, 0.7225, 1.0), (0, 10, 0.0, 0.2775), (500, 1000, 0.4691, 0.5309)],
)
def test_wilson(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


def test_scores_of_zero_and_one_get_wilsons_interval() -> None:
    found = mean_score([1.0] * 8 + [0.0] * 2, seed=0)
    assert found["value"] == 0.8
    assert (found["low"], found["high"]) == wilson(8, 10)
    assert (found["n"], found["method"]) == (10, "wilson")


def test_partial_scores_get_a_bootstrap() -> None:
    scores = [0.0, 1 / 3, 2 / 3, 1.0] * 50
    found = mean_score(scores, seed=0)
    assert found["method"] == "bootstrap"
    normal = 1.96 * np.std(scores) / np.sqrt(len(scores))
    assert found["low"] == pytest.approx(0.5 - normal, abs=0.01)
    assert found["high"] == pytest.approx(0.5 + normal, abs=0.01)
    assert mean_score(scores, seed=0) == found, "the same seed gives the same interval"


def test_difference_is_paired() -> None:
    """A pipeline that is right on one item less of every ten has no doubt about the sign, whatever the items are."""
    reference = [1.0, 0.0] * 50
    worse = list(reference)
    worse[::10] = [0.0] * 10
    found = mean_difference(worse, reference, seed=0)
    assert found["value"] == pytest.approx(-0.1)
    assert -0.17 < found["low"] < found["high"] < -0.03
    assert mean_difference(reference, reference, seed=0) == {"value": 0.0, "low": 0.0, "high": 0.0}


@pytest.mark.parametrize(
    ("both", "ours", "theirs", "neither", "low", "high"),
    [(36, 12, 2, 0, 0.0569, 0.3404), (54, 0, 0, 0, -0.0664, 0.0664), (20, 12, 2, 16, 0.0562, 0.3290)],
)
def test_newcombes_interval(both: int, ours: int, theirs: int, neither: int, low: float, high: float) -> None:
    """Worked examples of Newcombe 1998, table II (method 10)."""
    scores = [1.0] * (both + ours) + [0.0] * (theirs + neither)
    reference = [1.0] * both + [0.0] * ours + [1.0] * theirs + [0.0] * neither
    found = paired_difference(scores, reference, seed=0)
    assert found["value"] == pytest.approx((ours - theirs) / len(scores))
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=2e-3)
    assert (found["n"], found["method"]) == (len(scores), "newcombe")


def test_partial_scores_differ_by_a_paired_bootstrap() -> None:
    scores, reference = [1 / 3, 1.0, 0.0] * 20, [2 / 3, 1.0, 0.0] * 20
    found = paired_difference(scores, reference, seed=0)
    assert found == {**mean_difference(scores, reference, seed=0), "n": 60, "method": "bootstrap"}
    with pytest.raises(ValueError, match="3 and 2"):
        paired_difference([1.0, 0.0, 1.0], [1.0, 0.0], seed=0)


def test_ratio_is_paired() -> None:
    """Half the time on every call is a ratio of one half without doubt, though the calls differ tenfold."""
    reference_ms = list(np.linspace(1, 10, 40))
    found = ratio_of_medians([ms / 2 for ms in reference_ms], reference_ms, seed=0)
    assert found == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})


def test_ratio_takes_medians() -> None:
    found = ratio_of_medians([1.0, 2.0, 900.0], [4.0, 4.0, 4.0], seed=0)
    assert found["value"] == 0.5


def test_unpaired_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="3 and 2"):
        ratio_of_medians([1.0, 2.0, 3.0], [1.0, 2.0], seed=0)


def test_percentile() -> None:
    samples = [float(i) for i in range(1, 12)]
    assert percentile(samples, 50) == 6.0
    assert percentile(samples, 90) == 10.0
