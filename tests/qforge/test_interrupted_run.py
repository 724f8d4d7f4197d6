"""A real training run that is interrupted and killed ends with the very bits of one that was left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from qforge.console import INTERRUPTED
from runtime.files import sha256_of
from tests.signals import hears_ctrl_c
from tests.tiny import write_tiny_halves

ROOT = Path(__file__).parent.parent.parent
STAGE = {"steps": 40, "batch_size": 8, "warmup_steps": 2, "eval_every": 40, "eval_items": 8, "save_every": 1}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Training of seconds over a handful of scenes, with a resume point after every step and dropout on."""
    tree = {
        "model": write_tiny_halves(tmp_path / "halves").model_dump(mode="json"),
        "data": {"demo": {"train_scenes": 40, "val_scenes": 8, "test_scenes": 8, "questions_per_scene": 2}},
        "stage1": STAGE,
        "stage2": STAGE | {"steps": 2},
        "vqa": STAGE,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(recipe: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from qforge.cli import main; main()", "train", str(recipe), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=hears_ctrl_c,
    )


def interrupt(recipe: Path, out: Path, stage: str, with_signal: signal.Signals) -> tuple[int, str]:
    """Train until `stage` has a resume point, then send the signal; returns exit code and stderr."""
    process = start(recipe, out)
    deadline = time.monotonic() + 60
    while not list((out / ".steps/working").glob(f"{stage}-*/.*.partial/resume.pt")):
        assert process.poll() is None, f"the run ended before {stage} could be interrupted"
        assert time.monotonic() < deadline, f"{stage} never saved a resume point"
        time.sleep(0.005)
    process.send_signal(with_signal)
    _, said = process.communicate(timeout=30)
    return process.returncode, said


@pytest.mark.slow
def test_interrupted_and_killed_run_ends_with_the_same_weights(recipe: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _, said = start(recipe, whole).communicate(timeout=120)
    assert "[4/4] vqa: done" in said

    code, said = interrupt(recipe, broken, "stage1", signal.SIGINT)
    assert (code, said.splitlines()[-1]) == (2, INTERRUPTED)
    assert "Traceback" not in said
    code, _ = interrupt(recipe, broken, "vqa", signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (broken / "checkpoint").exists()

    _, said = start(recipe, broken).communicate(timeout=120)
    assert [line for line in said.splitlines() if "skipped" in line] == [
        "[1/4] data: unchanged, skipped",
        "[2/4] stage1: unchanged, skipped",
        "[3/4] stage2: unchanged, skipped",
    ]
    for folder in ("steps/stage1", "checkpoint"):
        assert sha256_of(broken / folder / "model.safetensors") == sha256_of(whole / folder / "model.safetensors")
