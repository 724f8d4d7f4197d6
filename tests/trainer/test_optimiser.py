"""Rates and decay as the optimiser has them, after the schedule has set them."""

import pytest
import torch

from trainer.blip2 import new_blip2
from trainer.config import CaptionConfig, ModelConfig, Stage1Config
from trainer.optimiser import learning_rate, make_optimiser, set_rates

SCHEDULE = dict(steps=100, batch_size=8, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)


def test_warm_up_and_cosine() -> None:
    config = Stage1Config(**SCHEDULE)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    slow = Stage1Config(**SCHEDULE, warmup_learning_rate=0.5)
    assert [learning_rate(step, slow) for step in (0, 4, 9)] == pytest.approx([0.55, 0.75, 1.0])


def test_what_decays(model_config: ModelConfig) -> None:
    model = new_blip2(model_config, question_conditioned=True)
    model.vision.unfreeze(checkpointing=False)
    optimiser = make_optimiser(model, CaptionConfig(**SCHEDULE, train_vision=True))
    decay_of = {p: group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
    assert decay_of.keys() == {p for p in model.parameters() if p.requires_grad}
    bridge, tower = model.bridge, dict(model.vision.model.named_parameters())
    kept = [bridge.temperature, bridge.query_tokens, bridge.embeddings.word_embeddings.weight, bridge.itm_head.bias]
    kept += [tower["embeddings.position_embedding.weight"], tower["embeddings.class_embedding"]]
    decayed = [bridge.itm_head.weight, tower["embeddings.patch_embedding.weight"]]
    assert {decay_of[p] for p in kept} == {0.0}
    assert {decay_of[p] for p in decayed} == {0.05}


def test_every_part_has_its_rate_after_the_schedule_has_moved(model_config: ModelConfig) -> None:
    """Two layers, decay 0.5: embeddings an eighth, layers a quarter and a half, outside 1 (reference §1.10, 1)."""
    model = new_blip2(model_config, question_conditioned=False)
    model.vision.unfreeze(checkpointing=False)
    more = dict(train_vision=True, vision_layer_decay=0.5, vision_rate=0.2, projection_rate=3.0)
    config = CaptionConfig(**SCHEDULE, **more)
    optimiser = make_optimiser(model, config)
    before = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}
    for parameter in before:
        parameter.grad = torch.ones_like(parameter)
    set_rates(optimiser, 55, config)
    rate_of = {p: group["lr"] for group in optimiser.param_groups for p in group["params"]}
    tower = dict(model.vision.model.named_parameters())
    expected = {
        tower["embeddings.class_embedding"]: 0.55 * 0.2 * 0.125,
        tower["encoder.layers.0.mlp.fc1.bias"]: 0.55 * 0.2 * 0.25,
        tower["encoder.layers.1.mlp.fc1.bias"]: 0.55 * 0.2 * 0.5,
        model.bridge.language_projection.bias: 0.55 * 3.0,
        model.bridge.itm_head.bias: 0.55,
    }
    assert {p: rate_of[p] for p in expected} == pytest.approx(expected)
    optimiser.step()
    for parameter, rate in expected.items():  # AdamW's first step on a gradient of ones moves by the rate
        torch.testing.assert_close(before[parameter] - parameter.detach(), torch.full_like(parameter, rate))


def test_rates_of_a_frozen_tower_are_refused() -> None:
    with pytest.raises(ValueError, match="vision_layer_decay is for a trained image encoder"):
        CaptionConfig(vision_layer_decay=0.9)
