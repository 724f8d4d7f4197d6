"""Draws depend on a row's place in the global batch, never on who holds it."""

import numpy as np
import pytest

from trainer.draws import StepDraws

KEY = (5, 0, 17)


def draw(draws: StepDraws, place: int, purpose: str = "text") -> float:
    return float(draws.row(place, purpose).random())


def test_a_row_has_the_same_draws_on_any_process() -> None:
    whole = StepDraws(KEY, 0, 8)
    halves = [StepDraws(KEY, first, 8) for first in (0, 4)]
    parts = halves[1].at([2, 3])
    for place in range(8):
        assert draw(halves[place // 4], place % 4) == draw(whole, place)
    assert [draw(parts, 0), draw(parts, 1)] == [draw(whole, 6), draw(whole, 7)]
    assert [parts.place(0), parts.at([1]).place(0)] == [6, 7]
    assert np.array_equal(halves[1].shared("negatives").random(4), whole.shared("negatives").random(4))


@pytest.mark.parametrize("other", [(6, 0, 17), (5, 1, 17), (5, 0, 18)])
def test_seed_stage_step_row_and_purpose_each_draw_anew(other: tuple[int, int, int]) -> None:
    one, two = StepDraws(KEY, 0, 8), StepDraws(other, 0, 8)
    assert draw(one, 3) != draw(two, 3)
    assert one.shared("negatives").random() != two.shared("negatives").random()
    assert one.torch_seed(0, 0) != two.torch_seed(0, 0)
    drawn = [draw(one, 3), draw(one, 4), draw(one, 3, "image"), one.shared("text").random()]
    assert len(set(drawn)) == 4
    assert len({one.torch_seed(process, part) for process in range(4) for part in range(4)}) == 16
