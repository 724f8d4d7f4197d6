"""Loss values against closed forms: chance, floors, and who may be a negative."""

import math

import pytest
import torch

from runtime.errors import DataError
from trainer.losses import (
    generation_loss,
    hard_negatives,
    itc_loss,
    same_image,
    similarities,
)


def eye(size: int) -> torch.Tensor:
    return torch.eye(size, dtype=torch.bool)


def test_itc_at_chance_is_the_log_of_the_batch() -> None:
    nothing = torch.zeros(32, 32)
    assert float(itc_loss(nothing, nothing, eye(32), 0.1)) == pytest.approx(math.log(32), abs=1e-5)


@pytest.mark.parametrize(("size", "floor"), [(256, 0.876), (1024, 1.017), (1680, 1.067)])
def test_itc_floor_with_smoothing(size: int, floor: float) -> None:
    """Perfect logits reach the entropy of the smoothed target: the floor table of reference training.md 1.11."""
    perfect = (torch.full((size, size), 0.1 / size) + torch.eye(size) * 0.9).log()
    assert float(itc_loss(perfect, perfect, eye(size), 0.1)) == pytest.approx(floor, abs=2e-3)


def test_itc_is_the_mean_of_both_ways_over_all_keys() -> None:
    """torch's own label smoothing is the oracle, for two rows of a global batch of five."""
    torch.manual_seed(0)
    one, other, targets = torch.randn(2, 5), torch.randn(2, 5), torch.tensor([3, 4])
    expected = sum(torch.nn.functional.cross_entropy(way, targets, label_smoothing=0.1) for way in (one, other)) / 2
    found = itc_loss(one, other, torch.nn.functional.one_hot(targets, 5).bool(), 0.1)
    assert float(found) == pytest.approx(float(expected), abs=1e-6)


def test_itc_shares_the_positive_mass_between_rows_of_one_image() -> None:
    ids = torch.tensor([7, 7, 9])
    same = same_image(ids, ids)
    logits = torch.tensor([[5.0, 5.0, 0.0], [5.0, 5.0, 0.0], [0.0, 0.0, 5.0]])
    shared = itc_loss(logits, logits.T, same, 0.0)
    assert float(shared) == pytest.approx((2 * math.log(2) / 3), abs=0.02)
    assert float(itc_loss(logits, logits.T, eye(3), 0.0)) == pytest.approx(float(shared), abs=1e-5)


def test_similarity_is_the_best_query() -> None:
    image = torch.nn.functional.normalize(torch.randn(3, 4, 8), dim=-1)
    text = torch.nn.functional.normalize(torch.randn(5, 8), dim=-1)
    expected = torch.stack([torch.stack([max(q @ t for q in i) for t in text]) for i in image])
    assert torch.allclose(similarities(image, text), expected, atol=1e-6)


def test_hard_negatives_follow_the_softmax_and_never_share_the_image() -> None:
    """Frequencies of 20,000 draws against the softmax over other images: chi-square below its 99.9 % quantile."""
    torch.manual_seed(0)
    ids, draws = torch.tensor([0, 1, 1, 2, 3, 4]), 20_000
    same, logits = same_image(ids, ids), 2 * torch.randn(6, 6)
    uniform = torch.rand(draws * 6, dtype=torch.float64)
    found = hard_negatives(logits.repeat(draws, 1), same.repeat(draws, 1), uniform).view(draws, 6)
    for row in range(6):
        counts = found[:, row].bincount(minlength=6).double()
        expected = draws * logits[row].double().masked_fill(same[row], float("-inf")).softmax(0)
        assert not counts[same[row]].any()
        allowed = ~same[row]
        statistic = ((counts - expected)[allowed] ** 2 / expected[allowed]).sum()
        assert float(statistic) < 18.47, "chi-square, 4 degrees of freedom"


def test_hard_negatives_at_the_edges_of_the_unit_interval() -> None:
    """A draw of 0, or of the last number before 1, names a row of another image too."""
    same = torch.tensor([[True, False, True, False, True]])
    logits = torch.tensor([[50.0, 0.0, 50.0, 0.0, 50.0]])
    last = torch.nextafter(torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))
    assert int(hard_negatives(logits, same, torch.zeros(1, dtype=torch.float64))) == 1
    assert int(hard_negatives(logits, same, last[None])) == 3


def test_a_batch_of_one_image_is_refused() -> None:
    with pytest.raises(DataError, match="all 2 rows of a batch show the same one; raise batch_size"):
        hard_negatives(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, dtype=torch.float64))


def test_generation_loss_at_chance_and_at_its_floor() -> None:
    """ln V without knowledge; with perfect logits the entropy of the smoothed target, 1.358 at BERT's vocabulary."""
    vocabulary, targets = 30_523, torch.tensor([5, 7])
    nothing = torch.zeros(2, vocabulary)
    assert float(generation_loss(nothing, targets, 0.1, torch.tensor(2))) == pytest.approx(10.326, abs=1e-3)
    perfect = torch.full((2, vocabulary), 0.1 / vocabulary)
    perfect[torch.arange(2), targets] += 0.9
    assert float(generation_loss(perfect.log(), targets, 0.1, torch.tensor(2))) == pytest.approx(1.358, abs=2e-3)
    assert float(generation_loss(nothing, targets, 0.1, torch.tensor(4))) == pytest.approx(10.326 / 2, abs=1e-3)
