"""Checkpoints of stages that train the image encoder: it is there, once, and everybody who reads a tower reads it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runtime.errors import CheckpointError
from runtime.files import sha256_of
from tests.trainer.test_train import run
from trainer.checkpoint import load_checkpoint, read_config, with_trained_halves
from trainer.config import ModelConfig
from trainer.data import ResolvedData
from trainer.ema import Ema
from trainer.towers import load_vision

TRAINED = dict(
    train_vision=True, eval_items=1, vision_layer_decay=0.9, image_size=24, steps=2, save_every=1, eval_every=2
)


@pytest.fixture(scope="module")
def checkpoint(model_config: ModelConfig, data: ResolvedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A caption fine-tune that trained a 16-pixel tower at 24 pixels."""
    return run("caption", model_config, data, tmp_path_factory.mktemp("trained") / "caption", **TRAINED)


def test_the_tower_lies_in_the_checkpoint_once(checkpoint: Path, model_config: ModelConfig) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["model"]["vision"] == "./vision"
    assert config["model"]["image_size"] == 24
    assert config["model"]["caption_prompt"] == "a photo of"
    assert set(config["frozen"]) == {"language/model.safetensors"}
    tower = checkpoint / "vision" / "model.safetensors"
    assert config["trained"] == {"vision/model.safetensors": sha256_of(tower)}
    bridge = load_file(checkpoint / "model.safetensors")
    assert not [key for key in bridge if key.startswith("vision_model.") and "post_layernorm" not in key]
    before, after = load_file(Path(model_config.vision) / "model.safetensors"), load_file(tower)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if not key.startswith("post_layernorm.")}, "what no gradient reaches"


class Killed(BaseException):
    """Stands for a process that ends in the middle of a step."""


def test_a_killed_stage_goes_on_to_the_same_tower_and_average(
    model_config: ModelConfig, data: ResolvedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    averaged = dict(TRAINED, steps=4, save_every=2, eval_every=4, ema_decay=0.5, precision="fp32")
    whole = run("caption", model_config, data, tmp_path / "whole", **averaged)
    plain = run("caption", model_config, data, tmp_path / "plain", **(averaged | {"ema_decay": 0.0}))
    update, calls = Ema.update, list[int]()

    def dying(ema: Ema) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        update(ema)

    monkeypatch.setattr(Ema, "update", dying)
    with pytest.raises(Killed):
        run("caption", model_config, data, tmp_path / "cut", **averaged)
    cut = run("caption", model_config, data, tmp_path / "cut", **averaged)
    assert len(calls) == 5, "two steps, one that died, and two more from the resume point"
    for name in ("model.safetensors", "vision/model.safetensors"):
        assert sha256_of(cut / name) == sha256_of(whole / name)
        assert sha256_of(plain / name) != sha256_of(whole / name), "what is saved is the average"


@torch.no_grad()
def test_it_is_read_back_strictly_and_by_export_too(checkpoint: Path, tmp_path: Path) -> None:
    model, mapped = load_checkpoint(checkpoint), load_checkpoint(checkpoint, mapped_beside=tmp_path)
    pixels = torch.randn(2, 3, 24, 24)
    stored = load_vision(str(checkpoint / "vision"), -1, 24)
    assert torch.equal(model.vision(pixels), stored(pixels))
    assert torch.equal(mapped.encode_image(pixels), model.encode_image(pixels))
    assert not any(p.requires_grad for p in model.vision.parameters())


def test_a_changed_tower_is_refused(checkpoint: Path, model_config: ModelConfig) -> None:
    weights = checkpoint / "vision" / "model.safetensors"
    kept = weights.read_bytes()
    try:
        weights.write_bytes((Path(model_config.vision) / "model.safetensors").read_bytes())
        with pytest.raises(CheckpointError, match=r"its trained vision/model\.safetensors had SHA-256"):
            load_checkpoint(checkpoint)
    finally:
        weights.write_bytes(kept)


def test_the_next_stage_goes_on_with_it(
    checkpoint: Path, model_config: ModelConfig, data: ResolvedData, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="trained vision"):
        run("vqa", model_config, data, tmp_path / "foreign", init=checkpoint, steps=1)
    went_on = with_trained_halves(model_config, checkpoint)
    out = run("vqa", went_on, data, tmp_path / "vqa", init=checkpoint, steps=1, image_size=24)
    config = read_config(out)
    assert Path(config.model.vision) == checkpoint / "vision"
    assert config.trained == {}
    assert config.frozen["vision/model.safetensors"] == sha256_of(checkpoint / "vision" / "model.safetensors")
    load_checkpoint(out)
