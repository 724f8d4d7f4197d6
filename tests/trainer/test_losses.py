"""Loss values against closed forms: chance, floors, and who may be a negative."""

import math

import pytest
import torch

from trainer.losses import (
    IGNORED,
    hard_negatives,
    itc_loss,
    same_image,
    similarities,
    text_loss,
)


def test_itc_at_chance_is_the_log_of_the_batch() -> None:
    assert float(itc_loss(torch.zeros(32, 32), torch.eye(32, dtype=torch.bool), 0.1)) == pytest.approx(
        math.log(32), abs=1e-5
    )


def test_itc_floor_with_smoothing() -> None:
    """Perfect logits reach the entropy of the smoothed target: the floor table of reference training.md 1.11."""
    size, smoothing = 256, 0.1
    targets = torch.full((size, size), smoothing / size) + torch.eye(size) * (1 - smoothing)
    assert float(itc_loss(targets.log(), torch.eye(size, dtype=torch.bool), smoothing)) == pytest.approx(
        0.876, abs=2e-3
    )


def test_itc_shares_the_positive_mass_between_rows_of_one_image() -> None:
    same = same_image(torch.tensor([7, 7, 9]))
    logits = torch.tensor([[5.0, 5.0, 0.0], [5.0, 5.0, 0.0], [0.0, 0.0, 5.0]])
    shared = itc_loss(logits, same, 0.0)
    assert float(shared) == pytest.approx((2 * math.log(2) / 3), abs=0.02)
    assert float(itc_loss(logits, torch.eye(3, dtype=torch.bool), 0.0)) == pytest.approx(float(shared), abs=1e-5)


def test_similarity_is_the_best_query() -> None:
    image = torch.nn.functional.normalize(torch.randn(3, 4, 8), dim=-1)
    text = torch.nn.functional.normalize(torch.randn(5, 8), dim=-1)
    expected = torch.stack([torch.stack([max(q @ t for q in i) for t in text]) for i in image])
    assert torch.allclose(similarities(image, text), expected, atol=1e-6)


def test_hard_negatives_follow_similarity_and_never_share_the_image() -> None:
    torch.manual_seed(0)
    same = same_image(torch.tensor([0, 1, 1, 2]))
    logits = torch.zeros(4, 4)
    logits[0] = torch.tensor([9.0, 3.0, 0.0, 0.0])
    draws = torch.stack([torch.stack(hard_negatives(logits, same)) for _ in range(4000)])
    for way in (0, 1):
        for row in range(4):
            assert not same[row][draws[:, way, row]].any()
    share = (draws[:, 0, 0] == 1).float().mean()
    assert float(share) == pytest.approx(math.exp(3) / (math.exp(3) + 2), abs=0.03)


def test_text_loss_shifts_and_ignores() -> None:
    labels = torch.tensor([[IGNORED, 1, 2, IGNORED]])
    logits = torch.full((1, 4, 5), -30.0)
    logits[0, 0, 1] = logits[0, 1, 2] = 30.0
    assert float(text_loss(logits, labels)) == pytest.approx(0.0, abs=1e-5)
    assert float(text_loss(torch.zeros(1, 4, 5), labels)) == pytest.approx(math.log(5), abs=1e-5)
