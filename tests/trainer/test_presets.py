"""The numbers of the paper and of LAVIS, as recipes resolve them, beside the tables they were published in."""

from pathlib import Path
from typing import Any

import pytest

from qforge.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parent.parent.parent / "recipes"

# arXiv 2301.12597: section 4.1 (ViT-g, OPT), tables 7-9 (OPT-2.7B, ViT-g). Betas are (0.9, beta2).
PRETRAINING = {"learning_rate": 1e-4, "warmup_steps": 2_000, "beta1": 0.9, "beta2": 0.98, "weight_decay": 0.05}
FINE_TUNE = {"warmup_steps": 1_000, "learning_rate": 1e-5, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.05}
PAPER: dict[str, dict[str, Any]] = {
    "stage1": {**PRETRAINING, "steps": 250_000, "batch_size": 1_680, "min_learning_rate": 1e-5},
    "stage2": {**PRETRAINING, "steps": 80_000, "batch_size": 1_920, "min_learning_rate": 5e-5},
    "caption": {**FINE_TUNE, "batch_size": 256, "image_size": 364, "prompt": "a photo of", "vision_layer_decay": 1.0},
    "vqa": {**FINE_TUNE, "batch_size": 128, "image_size": 490, "vision_layer_decay": 0.95},
    "retrieval": {**FINE_TUNE, "batch_size": 224, "image_size": 364, "vision_layer_decay": 0.95, "candidates": 128},
}
# LAVIS 506965b: pretrain_stage1, pretrain_stage2, caption_coco_ft, retrieval_coco_ft; no VQA configuration exists.
SIXTEEN_GPUS = 16
LAVIS_PRETRAINING = {
    **PRETRAINING,
    "min_learning_rate": 1e-5,
    "warmup_learning_rate": 1e-6,
    "beta2": 0.999,
    "clip_norm": 0.0,
}
LAVIS_FINE_TUNE = {
    **FINE_TUNE,
    "image_size": 364,
    "min_learning_rate": 0.0,
    "warmup_learning_rate": 1e-8,
    "clip_norm": 0.0,
}
LAVIS: dict[str, dict[str, Any]] = {
    "stage1": {**LAVIS_PRETRAINING, "batch_size": 100 * SIXTEEN_GPUS, "warmup_steps": 5_000},
    "stage2": {**LAVIS_PRETRAINING, "batch_size": 64 * SIXTEEN_GPUS, "language_dropout": True},
    "caption": {**LAVIS_FINE_TUNE, "batch_size": 16 * SIXTEEN_GPUS, "language_dropout": True},
    "retrieval": {**LAVIS_FINE_TUNE, "batch_size": 14 * SIXTEEN_GPUS, "vision_layer_decay": 0.95, "candidates": 128},
}


@pytest.mark.parametrize(("name", "published"), [("paper", PAPER), ("lavis", LAVIS)])
def test_numbers_are_the_published_ones(name: str, published: dict[str, dict[str, Any]]) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert recipe.stages == tuple(published)
    for stage, numbers in published.items():
        found = getattr(recipe, stage)
        assert {key: getattr(found, key) for key in numbers} == pytest.approx(numbers), stage
        assert found.train_vision == (stage not in ("stage1", "stage2"))


def test_the_defaults_of_a_stage_are_the_papers() -> None:
    """A recipe of one's own that names nothing trains with the paper's schedule; what costs memory is asked for."""
    defaults = Recipe()
    asked = {"image_size", "vision_layer_decay"}
    for stage, numbers in PAPER.items():
        same = {key: value for key, value in numbers.items() if key not in asked}
        assert {key: getattr(getattr(defaults, stage), key) for key in same} == pytest.approx(same), stage


def test_five_epochs_of_the_fine_tunes() -> None:
    """COCO has 566,747 captions in Karpathy's train split, VQAv2 658,111 questions in train and val."""
    recipe, coco, vqav2 = load_recipe(RECIPES / "paper.yaml"), 566_747, 658_111
    for stage, items in ((recipe.caption, coco), (recipe.vqa, vqav2), (recipe.retrieval, coco)):
        assert stage.steps * stage.batch_size / items == pytest.approx(5, abs=0.001)
