"""A model that plain INT8 breaks: a few LayerNorm gains x40, as the outlier channels of large transformers have them.

Four channels of the residual stream carry a constant, as they do in published towers, and every LayerNorm passes them
on faintly; that in front of one feed-forward network has its gains there x40. The bias behind it takes the constant out
again, so in fp32 the function is an ordinary one. In INT8 the weights of the four rows set each column's scale, and
what is left for the other rows is a level or two. SmoothQuant does not help: it moves the outlier into those rows.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from export import facts
from export.trace import describe
from runtime.bundle import Bundle, write_manifest
from tests.export.conftest import QUIET, Export
from tests.tiny import widen
from trainer.blip2 import Blip2, new_blip2
from trainer.checkpoint import write_checkpoint
from trainer.data_config import DemoWorldConfig
from trainer.demo_world import write_demo_world
from trainer.new_halves import new_vision_tower

SIDE, WIDTH, LAYERS = 16, 32, 4
GAIN, CONSTANT, CHANNELS, LAYER = 40.0, 30.0, 4, 2


def plant(tower: torch.nn.Module, post_layernorm: torch.nn.LayerNorm) -> None:
    """Rewrite random weights as told above."""
    channels = torch.from_numpy(np.random.default_rng(0).choice(WIDTH, CHANNELS, replace=False))
    heard = (1 + CONSTANT**2 * CHANNELS / WIDTH) ** 0.5
    norms = {name: module for name, module in tower.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight", "patch_embedding.weight")):
                parameter[channels] = 0  # nobody writes there
            elif "embedding" in name:
                parameter[..., channels] = 0
        next(norm for name, norm in norms.items() if "pre" in name).bias[channels] = CONSTANT * torch.tensor(
            [1.0, -1.0, 1.0, -1.0]
        )
        for norm in [*(norm for name, norm in norms.items() if "layers" in name), post_layernorm]:
            norm.weight *= heard
            norm.weight[channels] = 0.02
        loud = next(norm for name, norm in norms.items() if f"layers.{LAYER}.layer_norm2" in name)
        network = next(module for name, module in tower.named_modules() if name.endswith(f"layers.{LAYER}.mlp"))
        loud.weight[channels] = GAIN
        network.fc1.weight[:, channels] *= 10
        network.fc2.weight *= 3
        seen: list[torch.Tensor] = []
        hook = loud.register_forward_hook(lambda _, __, output: seen.append(output))
        tower(torch.rand(8, 3, SIDE, SIDE) * 4 - 2)
        hook.remove()
        network.fc1.bias -= network.fc1.weight[:, channels] @ seen[0][..., channels].mean(dim=(0, 1))


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 questions about 8 images that nothing is calibrated on."""
    config = DemoWorldConfig(train_scenes=2, val_scenes=8, test_scenes=2, questions_per_scene=3, image_size=32, seed=7)
    return write_demo_world(config, tmp_path_factory.mktemp("held_out") / "data", QUIET) / "vqa_val.jsonl"


@pytest.fixture(scope="session")
def planted(
    model: Blip2, bundle_fp32: Bundle, manifests: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Export:
    """Exports it; all graphs but the vision tower are those of the tiny model, so that only one is traced."""
    home = tmp_path_factory.mktemp("planted")
    torch.manual_seed(0)
    tower = new_vision_tower(image_size=SIDE, patch=4, width=WIDTH, layers=LAYERS, heads=4)
    widen(tower, 0.15, matrices_only=True)
    norm = torch.nn.LayerNorm(WIDTH)
    plant(tower, norm)
    tower.save_pretrained(home / "vision")
    stored = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.25, 0.2], "resample": 3}
    (home / "vision" / "preprocessor_config.json").write_text(json.dumps(stored))
    config = model.config.model_copy(update={"vision": str(home / "vision"), "max_new_tokens": 1})
    fresh = new_blip2(config, question_conditioned=True)
    fresh.bridge.load_state_dict(model.bridge.state_dict())
    fresh.bridge.post_layernorm.load_state_dict(norm.state_dict())
    (home / "checkpoint").mkdir()
    write_checkpoint(fresh, home / "checkpoint", stage="vqa", metrics={}, recipe_yaml="seed: 1\n")
    known = reusable(bundle_fp32, home / "checkpoint", home / "known")
    first = Export(home / "checkpoint", manifests, known)(home / "fp32")
    return Export(home / "checkpoint", manifests, first)


def reusable(bundle: Bundle, checkpoint: Path, to: Path) -> Path:
    """The bundle's graphs but for vision, as graphs of this checkpoint, which they are."""
    shutil.copytree(bundle.path / "onnx", to / "onnx")
    (to / "onnx" / "vision.onnx").unlink()
    facts_of = {name: getattr(bundle.manifest, name) for name in ("model", "limits", "preprocess", "prompts")}
    write_manifest(
        to,
        **facts_of,
        precision="fp32",
        language_precision="fp32",
        target="onnxruntime",
        generation=bundle.manifest.generation,
        graphs={file.stem: describe(file) for file in sorted((to / "onnx").iterdir())},
        made_by=facts.made_by(checkpoint),
    )
    return to
