"""Chance and floor lines equal the published table and what the losses themselves give at chance and at their best."""

import pytest
import torch
from torch.nn import functional as F

from trainer.logs.lines import contrast_lines, generation_lines, matching_lines
from trainer.losses import generation_loss, itc_loss


@pytest.mark.parametrize(
    ("candidates", "chance", "floor"), [(256, 5.55, 0.876), (1024, 6.93, 1.017), (1680, 7.43, 1.067)]
)
def test_contrast_lines_are_those_of_the_reference(candidates: int, chance: float, floor: float) -> None:
    lines = contrast_lines(candidates, 0.1)
    assert lines.chance == pytest.approx(chance, abs=5e-3)
    assert lines.floor == pytest.approx(floor, abs=5e-4)


def test_generation_and_matching_lines_are_those_of_the_reference() -> None:
    words = generation_lines(30_523, 0.1)
    assert words.chance == pytest.approx(10.33, abs=5e-3)
    assert words.floor == pytest.approx(1.358, abs=5e-4)
    assert words.stuck == pytest.approx(6.0, abs=5e-3)
    pairs = matching_lines()
    assert pairs.chance == pytest.approx(0.6931, abs=5e-5)
    assert pairs.prior == pytest.approx(0.6365, abs=5e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_lines_are_what_the_losses_give(smoothing: float) -> None:
    """Equal logits give chance; no logits beat those equal to the logarithm of the smoothed targets."""
    pairs, lines = 12, contrast_lines(12, smoothing)
    own, equal = torch.eye(pairs, dtype=torch.bool), torch.zeros(pairs, pairs)
    assert float(itc_loss(equal, equal, own, smoothing)) == pytest.approx(lines.chance, rel=1e-5)
    best = ((1 - smoothing) * own + smoothing / pairs).clamp_min(1e-30).log()
    assert float(itc_loss(best, best, own, smoothing)) == pytest.approx(lines.floor, rel=1e-5, abs=1e-6)
    words, tokens = generation_lines(20, smoothing), torch.tensor(30.0)
    said = torch.randint(20, (30,), generator=torch.Generator().manual_seed(0))
    assert float(generation_loss(torch.zeros(30, 20), said, smoothing, tokens)) == pytest.approx(words.chance, rel=1e-5)
    best = ((1 - smoothing) * F.one_hot(said, 20) + smoothing / 20).clamp_min(1e-30).log()
    found = float(generation_loss(best, said, smoothing, tokens))
    assert found == pytest.approx(words.floor, rel=1e-5, abs=1e-6)


def test_matching_prior_is_the_best_answer_without_looking() -> None:
    labels = torch.tensor([1, 0, 0])
    blind = torch.tensor([2 / 3, 1 / 3]).log().expand(3, 2)
    assert float(F.cross_entropy(blind, labels)) == pytest.approx(matching_lines().prior)
