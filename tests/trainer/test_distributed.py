"""Two processes come to what one comes to with the same global batch; none of them waits for another in vain."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runtime.files import sha256_of
from tests.trainer.launch import finish, start
from tests.trainer.together import RESUMED, SAME_ON_BOTH, TRAININGS, Given
from trainer.config import ModelConfig
from trainer.ranks import Ranks

LOSS = 1e-5
"""Largest difference of a loss: sums of few numbers in another order."""
WEIGHT = 1e-4
"""Largest difference of a weight after four steps of at most 1e-3: Adam divides by gradients near zero."""


@pytest.fixture(scope="module")
def folder(model_config: ModelConfig, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have done all trainings."""
    folder = tmp_path_factory.mktemp("together")
    copy = folder / "world"
    shutil.copytree(world, copy)
    for name in ("train-00003.png", "train-00007.png", "train-00020.png"):
        (copy / "images" / name).write_bytes(b"not a picture")
    Given.write(folder, model_config, world, copy)
    ended = finish(start("tests.trainer.together", str(folder)))
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2][-3000:] + ended[1][2][-3000:]
    return folder


@pytest.fixture(scope="module")
def given(folder: Path) -> Given:
    return Given(folder)


def steps(folder: Path, name: str, processes: int) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = json.loads((folder / f"{name}.{processes}.json").read_text())
    return steps


def difference(one: Path, other: Path) -> float:
    """Largest difference between the weights of two checkpoints."""
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert ours.keys() == theirs.keys()
    return max(float((ours[key] - theirs[key]).abs().max()) for key in ours)


@pytest.mark.parametrize("name", SAME_ON_BOTH)
def test_two_processes_equal_one(name: str, folder: Path, given: Given) -> None:
    alone = given.train(name, Ranks())
    pairs = list(zip(steps(folder, name, 1), steps(folder, name, 2), strict=True))
    assert len(pairs) == TRAININGS[name][1].steps
    for one, two in pairs:
        assert one["loss"] == pytest.approx(two["loss"], abs=LOSS)
        assert one["figures"] == pytest.approx(two["figures"], abs=LOSS)
        assert one["gradient_norm"] == pytest.approx(two["gradient_norm"], rel=1e-3)
    assert difference(alone, folder / f"{name}.2") < WEIGHT
    metrics = [json.loads((folder / f"{name}.{n}" / "metrics.json").read_text()) for n in (1, 2)]
    assert metrics[0]["broken_images"] == metrics[1]["broken_images"]
    assert len(metrics[0]["broken_images"]) == (3 if name == "broken" else 0)


@pytest.mark.parametrize("whole", ["stage1", "stage2"])
def test_parts_equal_the_whole_batch(whole: str, folder: Path) -> None:
    """Accumulation changes nothing: the contrastive batch and its negatives stay those of all parts together."""
    for one, two in zip(steps(folder, whole, 2), steps(folder, f"{whole}_parts", 2), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=LOSS)
        assert one["figures"] == pytest.approx(two["figures"], abs=LOSS)
        assert one["gradient_norm"] == pytest.approx(two["gradient_norm"], rel=1e-3)
    assert difference(folder / f"{whole}.2", folder / f"{whole}_parts.2") < WEIGHT


@pytest.mark.parametrize(("sharded", "whole"), [("sharded", "stage2"), ("sharded_tower", "whole_tower")])
def test_shared_out_halves_train_as_whole_ones(sharded: str, whole: str, folder: Path) -> None:
    for one, two in zip(steps(folder, sharded, 2), steps(folder, whole, 2), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=LOSS)
        assert one["gradient_norm"] == pytest.approx(two["gradient_norm"], rel=1e-3)
    assert difference(folder / f"{sharded}.2", folder / f"{whole}.2") < WEIGHT
    if whole == "whole_tower":
        towers = [load_file(folder / f"{name}.2" / "vision" / "model.safetensors") for name in (sharded, whole)]
        assert max(float((towers[0][key] - towers[1][key]).abs().max()) for key in towers[0]) < WEIGHT


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_of_two_processes_goes_on_with_the_same_bits(name: str, folder: Path, given: Given) -> None:
    whole, resumed = (folder / f"{name}_{how}.2" for how in ("whole", "cut"))
    assert [step["step"] for step in steps(folder, f"{name}_cut", 2)] == [3, 4]
    weights = ["model.safetensors", *(["vision/model.safetensors"] if TRAININGS[name][1].train_vision else [])]
    for file in (*weights, "metrics.json"):
        assert sha256_of(resumed / file) == sha256_of(whole / file)
    if "vision/model.safetensors" in weights:
        untrained = Path(given.model.vision) / "model.safetensors"
        assert sha256_of(whole / "vision/model.safetensors") != sha256_of(untrained), "the tower was trained"
    assert steps(folder, f"{name}_cut", 2)[-1]["loss"] == steps(folder, f"{name}_whole", 2)[-1]["loss"]


def test_a_run_of_two_processes_goes_on_with_one(folder: Path, given: Given) -> None:
    alone = folder / "stage1.1"
    if not alone.exists():
        given.train("stage1", Ranks())
    (folder / ".cut.2.partial").rename(folder / ".cut.1.partial")
    resumed = given.train("stage1", Ranks(), out="cut")
    assert [step["step"] for step in steps(folder, "cut", 1)] == [3, 4]
    for one, two in zip(steps(folder, "stage1", 1)[2:], steps(folder, "cut", 1), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=LOSS)
    assert difference(alone, resumed) < WEIGHT


def test_a_loss_that_is_no_number_on_one_process_stops_all(folder: Path) -> None:
    said = [(folder / f"failed.{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert "stage2: the loss is nan at step 3 of 4" in said[0]
    facts = json.loads((folder / "stage2-failed-at-step-3" / "failure.json").read_text())
    assert [len(ids) for ids in facts["image_ids_by_process"]] == [4, 4]
    assert (folder / ".poisoned.2.partial" / "resume.pt").is_file()
    state = torch.load(folder / ".poisoned.2.partial" / "resume.pt", weights_only=True)
    assert state["step"] == 2
