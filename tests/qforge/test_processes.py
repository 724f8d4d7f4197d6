"""`qforge train` on two processes: the loss of one ends the other in a sentence, and what follows has the same bits."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from runtime.files import sha256_of
from tests.tiny import write_tiny_halves
from tests.trainer.launch import finish, start

STAGE = {"steps": 24, "batch_size": 8, "warmup_steps": 2, "eval_every": 24, "eval_items": 8, "save_every": 1}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A resume point after every step, and dropout on."""
    folder = tmp_path_factory.mktemp("recipe")
    tree = {
        "model": write_tiny_halves(folder / "halves").model_dump(mode="json"),
        "data": {"demo": {"train_scenes": 40, "val_scenes": 8, "test_scenes": 8, "questions_per_scene": 2}},
        "stage1": STAGE,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def train(recipe: Path, out: Path, *options: str) -> list[subprocess.Popen[str]]:
    return start("qforge", "train", str(recipe), "--out", str(out), "--stage", "stage1", "--json", *options)


def test_a_killed_process_ends_the_other_and_the_run_goes_on_with_the_same_bits(recipe: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    (code, said, _), (other_code, other_said, _) = finish(train(recipe, whole))
    assert (code, other_code) == (0, 0)
    assert json.loads(said)["checkpoint"] == str(whole / "steps/stage1")
    assert other_said == "", "one process speaks for all"

    processes = train(recipe, broken)
    deadline = time.monotonic() + 120
    while not list(broken.glob(".steps/working/stage1-*/.*.partial/resume.pt")):
        assert all(process.poll() is None for process in processes), "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no resume point was written"
        time.sleep(0.01)
    os.kill(processes[1].pid, signal.SIGKILL)
    (code, said, complained), (killed, _, _) = finish(processes, within_s=60)
    assert killed == -signal.SIGKILL
    assert code == 2
    assert "another of the 2 processes of this run has ended" in json.loads(said)["error"]
    assert "Traceback" not in complained
    assert not (broken / "steps/stage1").exists()

    (code, _, complained), _ = finish(train(recipe, broken))
    assert code == 0
    assert "data: unchanged, skipped" in complained
    assert sha256_of(broken / "steps/stage1/model.safetensors") == sha256_of(whole / "steps/stage1/model.safetensors")
