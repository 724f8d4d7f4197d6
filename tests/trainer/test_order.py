"""Which rows a step sees: permutations that are computed, mixtures in proportion, nothing that depends on the past."""

from collections import Counter

import numpy as np
import pytest

from runtime.errors import InputError
from trainer.order import BLOCK, mixed_rows_at, rows_at
from trainer.shuffle import LISTED, feistel, shuffled


@pytest.mark.parametrize("count", [2, 3, 5, 16, 17, 1000, 4096, LISTED + 1, 300_000])
def test_the_network_is_a_permutation(count: int) -> None:
    order = feistel(np.arange(count), count, (1, 2, 3))
    assert np.array_equal(np.sort(order), np.arange(count))
    if count > 1000:
        assert not np.array_equal(order, feistel(np.arange(count), count, (1, 2, 4)))


def test_a_permutation_of_ten_million_needs_no_list() -> None:
    places = np.arange(0, 10_000_000, 997)
    order = shuffled(places, 10_000_000, (0, 0))
    assert len(np.unique(order)) == len(places) and order.min() >= 0 and order.max() < 10_000_000
    assert np.array_equal(shuffled(places[[7]], 10_000_000, (0, 0)), order[[7]])


def test_the_network_shuffles_evenly() -> None:
    """Chi-square of where a row lands, over keys, and of neighbours' distances: as evenly as a random permutation."""
    count, keys, bins = 1000, 400, 10
    landed = np.stack([feistel(np.arange(count), count, (key,)) for key in range(keys)])
    expected = keys / bins
    for place in (0, 1, 499, 999):
        found = np.bincount(landed[:, place] * bins // count, minlength=bins)
        assert ((found - expected) ** 2 / expected).sum() < 33.7  # chi-square, 9 degrees: one in ten thousand beyond
    steps = np.diff(landed, axis=1)
    assert abs((steps > 0).mean() - 0.5) < 0.01
    assert abs(np.corrcoef(landed[:, :-1].ravel(), landed[:, 1:].ravel())[0, 1]) < 0.01
    fixed = (landed == np.arange(count)).sum(1)
    assert abs(fixed.mean() - 1) < 0.25, "a random permutation leaves one row in place on average"


@pytest.mark.parametrize("count", [15, LISTED + 4])
def test_an_epoch_holds_every_row_once(count: int) -> None:
    batch = count // 5
    seen = [row for step in range(10) for row in rows_at(step, batch, count, seed=0)]
    assert sorted(seen[:count]) == sorted(seen[count:]) == list(range(count))
    assert seen[:count] != seen[count:]
    assert rows_at(4, batch, count, seed=0) == seen[4 * batch : 5 * batch]
    assert rows_at(0, batch, count, seed=1) != seen[:batch]


def test_a_batch_larger_than_the_set_repeats_it() -> None:
    assert Counter(rows_at(3, 8, 2, seed=0)) == {0: 4, 1: 4}


SIZES, WEIGHTS = [10, 1000, 50], [1.0, 2.0, 1.0]


def test_a_mixture_holds_its_proportions() -> None:
    rows = np.array([row for step in range(8 * BLOCK // 16) for row in mixed_rows_at(step, 16, SIZES, WEIGHTS, seed=5)])
    sources = np.digitize(rows, [10, 1010])
    for block in range(8):
        assert np.bincount(sources[block * BLOCK :][:BLOCK]).tolist() == [256, 512, 256]
    first_batches = sources[:BLOCK].reshape(-1, 16)
    assert (first_batches == 1).sum(1).std() > 0.5, "which source a place belongs to is drawn, not a pattern"
    second = rows[sources == 1] - 10
    assert sorted(second[:1000]) == sorted(second[1000:2000]) == list(range(1000)), "each goes through its epochs"
    assert not np.array_equal(second[:1000], second[1000:2000])


def test_a_mixture_is_a_function_of_seed_and_step() -> None:
    far = 123_456
    one_process = mixed_rows_at(far, 32, SIZES, WEIGHTS, seed=5)
    assert one_process == mixed_rows_at(far, 32, SIZES, WEIGHTS, seed=5)
    halves = [mixed_rows_at(2 * far + half, 16, SIZES, WEIGHTS, seed=5) for half in (0, 1)]
    assert one_process == halves[0] + halves[1], "the same places, whatever pieces they are asked for in"
    assert one_process != mixed_rows_at(far, 32, SIZES, WEIGHTS, seed=6)
    assert mixed_rows_at(7, 4, [9], [3.0], 1) == rows_at(7, 4, 9, 1)


def test_small_weights_are_not_lost() -> None:
    weights = [1.0, 0.003, *[0.5] * 30]
    rows = np.array(mixed_rows_at(0, 20 * BLOCK, [1] * 32, weights, seed=0))
    shares = np.bincount(rows, minlength=32) / len(rows)
    np.testing.assert_allclose(shares, np.array(weights) / sum(weights), atol=32 / len(rows))
    assert shares[1] > 0
    with pytest.raises(InputError, match="at most 32 sources, found 33"):
        mixed_rows_at(0, 8, [1] * 33, [1.0] * 33, seed=0)
