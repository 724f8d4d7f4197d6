"""Any Hugging Face vision tower: which hidden state is read, at which size, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from runtime.errors import CheckpointError, InputError
from tests.tiny import widen
from trainer.towers import load_vision

SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=4
)
TOWERS: dict[str, tuple[Any, Any]] = {
    "blip2": (Blip2VisionModel, Blip2VisionConfig),
    "clip": (CLIPVisionModel, CLIPVisionConfig),
    "siglip": (SiglipVisionModel, SiglipVisionConfig),
    "vit": (ViTModel, ViTConfig),
    "dinov2": (Dinov2Model, Dinov2Config),
}
IMAGES = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.25, 0.2], "resample": 3}


def saved(name: str, folder: Path) -> Any:
    torch.manual_seed(0)
    kind, config = TOWERS[name]
    model = kind(config(**SIZES)).eval()
    widen(model)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    return model


@pytest.mark.parametrize("layer", [-1, -2, 1])
@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_a_tower_gives_the_hidden_state_that_was_asked_for(name: str, layer: int, tmp_path: Path) -> None:
    theirs, pixels = saved(name, tmp_path), torch.randn(2, 3, 16, 16)
    expected = theirs(pixel_values=pixels, output_hidden_states=True).hidden_states[layer]
    assert torch.equal(load_vision(str(tmp_path), layer)(pixels), expected)


@torch.no_grad()
def test_the_last_state_of_blip_2_is_before_its_own_norm(tmp_path: Path) -> None:
    theirs, pixels = saved("blip2", tmp_path), torch.randn(2, 3, 16, 16)
    found = theirs.post_layernorm(load_vision(str(tmp_path), -1)(pixels))
    assert torch.equal(found, theirs(pixel_values=pixels).last_hidden_state)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_a_larger_image_interpolates_the_positions_once(name: str, tmp_path: Path) -> None:
    theirs, pixels = saved(name, tmp_path), torch.randn(2, 3, 24, 24)
    resize = {} if name == "dinov2" else {"interpolate_pos_encoding": True}
    expected = theirs(pixel_values=pixels, output_hidden_states=True, **resize).hidden_states[-1]
    tower = load_vision(str(tmp_path), -1, image_size=24)
    assert tower.preprocess.height == tower.preprocess.width == 24
    assert (tower(pixels) - expected).abs().max() < 1e-6
    traced = torch.export.export(tower, (pixels,)).graph_module.code
    assert "upsample" not in traced
    assert "interpolate" not in traced


def test_what_a_tower_cannot_do_is_refused(tmp_path: Path) -> None:
    saved("clip", tmp_path)
    with pytest.raises(InputError, match=r"vision_layer: expected -4 to 3 .* found -5"):
        load_vision(str(tmp_path), -5)
    with pytest.raises(InputError, match=r"expected a multiple of the patch size 4 .* found 23"):
        load_vision(str(tmp_path), -1, image_size=23)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(IMAGES | {"resample": 5}))
    with pytest.raises(CheckpointError, match=r"expected resample 0, 1, 2, 3 \(PIL\), found 5"):
        load_vision(str(tmp_path), -1)
