"""Positions for any image size: the tower's own rule, without its decisions."""

import pytest
import torch
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from runtime.errors import InputError
from runtime.preprocess import PreprocessSettings
from tests.tiny import widen
from trainer.any_size import read_any_size
from trainer.new_halves import new_vision_tower
from trainer.towers import VisionTower

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
PIXELS = {"image_size": 16, "patch_size": 4}


def clip() -> CLIPVisionModel:
    return new_vision_tower(image_size=16, patch=4, width=16, layers=1, heads=2)


TOWERS = {
    "clip": clip,
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, **PIXELS)),
    "vit": lambda: ViTModel(ViTConfig(**SIZES, **PIXELS)),
    "blip2": lambda: Blip2VisionModel(Blip2VisionConfig(**SIZES, **PIXELS)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**{**SIZES, "mlp_ratio": 1}, **PIXELS)),
}


def tower_of(kind: str) -> VisionTower:
    torch.manual_seed(0)
    settings = PreprocessSettings(height=16, width=16, resample="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
    model = TOWERS[kind]()
    widen(model)  # some begin with positions of zero, which any rule interpolates
    return VisionTower(model, -1, settings)


@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_it_is_the_towers_own_rule(kind: str) -> None:
    own, ours, pixels = tower_of(kind), tower_of(kind), torch.randn(2, 3, 24, 24)
    trained = own(pixels[:, :, :16, :16])
    own.always_interpolate()
    read_any_size(ours, [24, 32])
    assert ours.other_sides == (24, 32)
    torch.testing.assert_close(ours(pixels), own(pixels), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours(pixels[:, :, :16, :16]), trained, atol=1e-6, rtol=0)


@pytest.mark.parametrize("side", [22, 16])
def test_sizes_that_cannot_be(side: int) -> None:
    with pytest.raises(InputError, match=f"other than the trained 16, multiples of the patch size 4 .* found {side}"):
        read_any_size(tower_of("clip"), [24, side])


def test_towers_that_cannot() -> None:
    tower = tower_of("clip")
    tower.model.embeddings.interpolate_pos_encoding = None
    tower.model.vision_model = None
    other = type("Fixed", (torch.nn.Module,), {})()
    other.config = tower.model.config
    tower.model = other
    with pytest.raises(InputError, match="Fixed cannot interpolate its positions"):
        read_any_size(tower, [24])


def test_another_rule_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = tower_of("clip")
    kind = type(tower.model.embeddings)
    real = kind.interpolate_pos_encoding
    monkeypatch.setattr(kind, "interpolate_pos_encoding", lambda self, *sizes: real(self, *sizes).flip(1))
    with pytest.raises(InputError, match="by another rule than bicubic"):
        read_any_size(tower, [24])
