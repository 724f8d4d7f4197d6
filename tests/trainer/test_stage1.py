"""The objective of stage 1: values at the start, losses that are off, and a batch that is spread over processes."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from runtime.dataset import Row
from runtime.errors import DataError
from tests.trainer.threads import together
from trainer.blip2 import Blip2, new_blip2
from trainer.config import ModelConfig, Stage1Config
from trainer.draws import StepDraws
from trainer.ranks import Ranks
from trainer.stage1 import Stage1

WORDS = ("red", "green", "blue", "circle", "square", "small", "large", "above", "below", "three")
ROWS = 12


class TensorRows:
    """Rows whose features are random, one image for each id."""

    def __init__(self, image_ids: list[str], width: int) -> None:
        rng = np.random.default_rng(0)
        words = [" ".join(rng.choice(WORDS, 2 + number % 5)) for number in range(len(image_ids))]
        self.rows = [
            Row(Path("none"), image_id, (text,), None, (), {}) for image_id, text in zip(image_ids, words, strict=True)
        ]
        known = {
            name: torch.randn(17, width, generator=torch.Generator().manual_seed(n)) for n, name in enumerate(image_ids)
        }
        self.features = torch.stack([known[name] for name in image_ids])

    def batch(self, indices: list[int], draws: StepDraws) -> tuple[list[Row], Tensor]:
        return [self.rows[index] for index in indices], self.features[indices]


@pytest.fixture(scope="module")
def model(model_config: ModelConfig) -> Blip2:
    torch.manual_seed(0)
    return new_blip2(model_config.model_copy(update={"language": None}), False).eval()


def stage1(model: Blip2, image_ids: list[str] | None = None, **settings: Any) -> Stage1:
    ids = [str(number) for number in range(ROWS)] if image_ids is None else image_ids
    config = Stage1Config(batch_size=len(ids), **settings)
    return Stage1(config, TensorRows(ids, model.vision.width), None, None)


def step(objective: Stage1, model: Blip2, ranks: Ranks) -> tuple[Tensor, dict[str, float]]:
    rows = objective.config.batch_size // ranks.count
    first = ranks.index * rows
    return objective.loss(
        model, list(range(first, first + rows)), StepDraws((0, 0, 7), first, ranks.count * rows), ranks
    )


def gradients(model: Blip2, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.bridge.named_parameters() if p.grad is not None}


def test_losses_start_at_chance(model: Blip2) -> None:
    _, figures = step(stage1(model), model, Ranks())
    vocabulary = len(model.text_tokenizer)
    for name, chance in (("itc", math.log(ROWS)), ("itm", math.log(2)), ("itg", math.log(vocabulary))):
        assert figures[name] == pytest.approx(chance, rel=0.05), name


@pytest.mark.parametrize("off", ["itc", "itm", "itg"])
def test_a_loss_of_weight_0_is_not_computed_and_leaves_the_others(model: Blip2, off: str) -> None:
    _, every = step(stage1(model), model, Ranks())
    loss, figures = step(stage1(model, **{f"{off}_weight": 0.0}), model, Ranks())
    assert figures.keys() == every.keys() - {off}
    assert all(figures[name] == pytest.approx(every[name], abs=1e-5) for name in figures)
    assert float(loss.detach()) == pytest.approx(sum(figures.values()), abs=1e-5)
    reached = gradients(model, loss)
    heads = {"itc": "temperature", "itm": "itm_head.weight", "itg": "itg_head.bias"}
    assert {name for name, head in heads.items() if head in reached} == figures.keys()


def test_weights_scale_the_loss_not_the_figures(model: Blip2) -> None:
    _, every = step(stage1(model), model, Ranks())
    loss, figures = step(stage1(model, itc_weight=0.5, itm_weight=2.0, itg_weight=0.25), model, Ranks())
    assert figures == pytest.approx(every, abs=1e-6)
    assert float(loss) == pytest.approx(0.5 * every["itc"] + 2 * every["itm"] + 0.25 * every["itg"], abs=1e-5)


@pytest.mark.parametrize("processes", [2, 3])
def test_a_batch_over_processes_equals_one_process(model: Blip2, processes: int) -> None:
    """Losses, and with gradient through the gathered keys every gradient too; only chosen images are sent."""
    ids = [str(number // 2) for number in range(ROWS)]
    objective = stage1(model, ids)
    whole, figures = step(objective, model, Ranks())
    expected = gradients(model, whole)
    sent = []

    def one(ranks: Ranks) -> tuple[Tensor, dict[str, float]]:
        result = step(objective, model, ranks)
        sent.append(ranks.sent)
        return result

    found = together(processes, one)
    mean = torch.stack([loss for loss, _ in found]).mean()
    assert float(mean) == pytest.approx(float(whole), abs=1e-5)
    for name, value in figures.items():
        assert np.mean([of_rank[name] for _, of_rank in found]) == pytest.approx(value, abs=1e-5), name
    assert 0 < sum(sent) <= ROWS
    reached = gradients(model, mean)
    assert reached.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.allclose(reached[name], gradient, rtol=1e-3, atol=1e-6 * largest), name


def test_keys_without_gradient_are_lavis_way(model: Blip2) -> None:
    """The same loss; features learn only as anchors, as if the other side of each product were a constant."""
    alone = dict(itm_weight=0.0, itg_weight=0.0)
    loss, _ = step(stage1(model, **alone), model, Ranks())
    detached, _ = step(stage1(model, **alone, itc_key_gradient=False), model, Ranks())
    assert float(loss) == float(detached)
    expected, found = gradients(model, loss), gradients(model, detached)
    assert torch.allclose(expected["temperature"], found["temperature"])
    image, text = "vision_projection.weight", "text_projection.weight"
    objective = stage1(model, **alone, itc_key_gradient=False)
    pairs = objective.read(model, list(range(ROWS)), StepDraws((0, 0, 7), 0, ROWS))
    (image_BQC, text_BC), _ = objective.embed(model, pairs)
    cosines = torch.einsum("iqc,tc->itq", image_BQC, text_BC.detach()).amax(-1) / model.bridge.temperature
    own = torch.arange(ROWS)
    by_hand = gradients(model, torch.nn.functional.cross_entropy(cosines, own, label_smoothing=0.1) / 2)
    assert torch.allclose(found[image], by_hand[image], atol=1e-7), "images are image-to-text anchors"
    assert not torch.allclose(expected[image], found[image], atol=1e-5)
    assert not torch.allclose(expected[text], found[text], atol=1e-5)


def test_rows_of_one_image_are_positives_and_never_negatives(model: Blip2) -> None:
    """Twelve rows of two images, the same on both processes: what is drawn shows the other image."""
    ids = ["a", "b"] * (ROWS // 2)
    objective = stage1(model, ids)

    def drawn(ranks: Ranks) -> list[tuple[str, str, str]]:
        rows = ROWS // ranks.count
        draws = StepDraws((0, 0, 1), ranks.index * rows, ROWS)
        pairs = objective.read(model, list(range(draws.first, draws.first + rows)), draws)
        embeddings, _ = objective.embed(model, pairs)
        negatives = objective.couple(model, embeddings, [pairs], draws, ranks)[2][0].negatives
        assert negatives is not None
        features = torch.cat([pairs.features_bnE, negatives.fetched_FnE])[negatives.wrong_images_b]
        images = ["b" if torch.equal(image, objective.train.features[-1]) else "a" for image in features]
        texts = [ids[place] for place in negatives.wrong_texts_b.tolist()]
        return list(zip(ids[draws.first :], texts, images, strict=False))

    for own, text, image in [row for of_rank in [drawn(Ranks()), *together(2, drawn)] for row in of_rank]:
        assert own != text and own != image
    shared, _ = step(stage1(model, ids, itm_weight=0.0, itg_weight=0.0), model, Ranks())
    assert float(shared) == pytest.approx(math.log(ROWS), rel=0.05)
    with pytest.raises(DataError, match="show the same one"):
        step(stage1(model, ["a"] * ROWS), model, Ranks())


def test_temperature_is_held_where_asked(model: Blip2) -> None:
    before = model.bridge.temperature.detach().clone()
    step(stage1(model, temperature_range=(0.2, 0.5)), model, Ranks())
    assert float(model.bridge.temperature) == pytest.approx(0.2)
    model.bridge.temperature.data.copy_(before)
    step(stage1(model), model, Ranks())
    assert torch.equal(model.bridge.temperature, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(itc_weight=0, itm_weight=0, itg_weight=0), "all 0"),
        (dict(batch_size=8, itc_queue=4), "holds less than a batch"),
        (dict(batch_size=8, itc_queue=8, itc_weight=0), "itc_queue serves ITC"),
        (dict(temperature_range=(0.5, 0.1)), "the smaller limit first"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Stage1Config(**settings)
