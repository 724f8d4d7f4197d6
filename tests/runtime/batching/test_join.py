"""Rows of two prefills in one run: scores are those of each apart, in whatever order they go on."""

import numpy as np
import pytest

from runtime.decoding.task import Floats, Ids, Steps
from tests.runtime.decoding.family import Family

TOLERANCE = 1e-5
"""Largest difference of a score; they are about 1, and rows of other batches round otherwise."""


def started(family: Family, rows: list[int]) -> tuple[Ids, Steps]:
    """The likeliest first token of each row, and the rows."""
    scores_BV, steps = family.decoder.start(family.prefix_BQD[rows], [family.prompts[row] for row in rows], 12)
    return scores_BV.argmax(axis=1), steps


@pytest.mark.parametrize("order", [[4, 0, 0, 3, 5, 1], [3, 1, 2, 0, 4, 5], [5]], ids=str)
def test_joined_rows_score_as_apart(family: Family, order: list[int]) -> None:
    short, long = [0, 6, 1], [4, 10, 5]  # prompts of 0 or 1, and of 4 or 5 tokens
    for one, other in ((short, long), (long, short)):
        apart = [started(family, one), started(family, other)]
        (first_B, joined), (second_B, joining) = started(family, one), started(family, other)
        assert joined.can_join(joining)
        joined.join(joining)
        ids_B = np.concatenate([first_B, second_B])
        expected = np.concatenate([steps.step(ids) for ids, steps in apart])
        np.testing.assert_allclose(joined.step(ids_B), expected, rtol=0, atol=TOLERANCE)
        order_B = np.array(order)
        ids_B = expected.argmax(axis=1)
        expected = np.concatenate([apart[0][1].step(ids_B[:3]), apart[1][1].step(ids_B[3:])])
        joined.select(order_B)
        np.testing.assert_allclose(joined.step(ids_B[order_B]), expected[order_B], rtol=0, atol=TOLERANCE)


def test_rows_that_said_unequally_much(family: Family) -> None:
    """A mask hides the pads between them; what is a pad in every row is given up."""
    (first_B, ahead), (second_B, behind) = started(family, [2, 5]), started(family, [3])
    (again_B, alone), (_, beside) = started(family, [2, 5]), started(family, [3])
    np.testing.assert_array_equal(first_B, again_B)
    for _ in range(3):
        first_B = ahead.step(first_B).argmax(axis=1)
        again_B = alone.step(again_B).argmax(axis=1)
    assert ahead.can_join(behind)
    assert behind.can_join(ahead)
    behind.join(ahead)
    expected: Floats = np.concatenate([beside.step(second_B), alone.step(again_B)])
    found = behind.step(np.concatenate([second_B, first_B]))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    behind.select(np.array([0]))
    second_B = expected[:1].argmax(axis=1)
    np.testing.assert_allclose(behind.step(second_B), beside.step(second_B), rtol=0, atol=TOLERANCE)
