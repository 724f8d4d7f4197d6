"""Resume points: taken at once, written behind, whole or not at all, and refused to other settings."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from runtime.errors import CheckpointError, InputError
from trainer import resume
from trainer.resume import OptimiserState, Progressed, ResumePoints
from trainer.stage_config import StageConfig, deciding

SETTINGS = {"stage1": {"learning_rate": 1e-4, "shard": []}, "seed": 0}


class Trained:
    """A model and its optimiser."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Linear(3, 2)
        self.optimiser = torch.optim.AdamW(self.model.parameters())

    def step(self) -> None:
        self.optimiser.zero_grad()
        self.model(torch.ones(1, 3)).sum().backward()
        self.optimiser.step()

    def points(self, folder: Path, settings: Any = SETTINGS) -> ResumePoints:
        parts = {"weights": self.model, "optimiser": OptimiserState(self.optimiser)}
        return ResumePoints(folder, parts, settings, writes=True)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A disk that waits until the event is set."""
    may, write = threading.Event(), resume._write

    def waiting(*arguments: Any) -> None:
        assert may.wait(10)
        write(*arguments)

    monkeypatch.setattr(resume, "_write", waiting)
    return may


def test_a_point_holds_the_moment_it_was_taken(tmp_path: Path, slow: threading.Event) -> None:
    """Training goes on, in place, while the disk is written."""
    trained = Trained(0)
    trained.step()
    weights = trained.model.weight.detach().clone()
    with trained.points(tmp_path / "point") as points:
        history = [{"loss": 1.0}]
        points.save(Progressed(1, history))
        assert not points.path.exists(), "the loop did not wait for the disk"
        trained.step()
        history.append({"loss": 2.0})
        slow.set()
    again = Trained(1)
    with again.points(tmp_path / "point") as points:
        done = points.restore()
    assert (done.step, done.history) == (1, [{"loss": 1.0}])
    assert torch.equal(again.model.weight, weights)
    again.step()
    assert torch.equal(again.model.weight, trained.model.weight), "the optimiser did not go on where it was"


def test_one_write_is_in_flight_and_its_failure_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    trained, write = Trained(0), resume._write
    trained.step()
    with trained.points(tmp_path / "point") as points:
        points.save(Progressed(1))
        points.settle()
        monkeypatch.setattr(resume, "_write", full)
        points.save(Progressed(2))
        with pytest.raises(OSError, match="No space left"):
            points.save(Progressed(3))
        monkeypatch.setattr(resume, "_write", write)
    with Trained(1).points(tmp_path / "point") as points:
        assert points.restore().step == 1, "the point before is lost"
    with pytest.raises(ValueError, match="of the loop") as caught, trained.points(tmp_path / "point") as points:
        monkeypatch.setattr(resume, "_write", full)
        points.save(Progressed(4))
        raise ValueError("of the loop")
    assert "No space left" in caught.value.__notes__[0]


def test_other_settings_are_refused_by_key(tmp_path: Path) -> None:
    trained = Trained(0)
    with trained.points(tmp_path / "point") as points:
        points.save(Progressed(7))
    changed = {"stage1": {"learning_rate": 2e-4, "shard": []}, "seed": 0, "new": 1}
    with (
        trained.points(tmp_path / "point", changed) as points,
        pytest.raises(InputError, match=r"7 steps .*: stage1.learning_rate was 0.0001, is now 0.0002; new was absent"),
    ):
        points.restore()
    assert points.path.is_file()


def test_only_measurements_and_weights_count() -> None:
    """What is logged and saved when may change at any time; what metrics.json holds may not."""
    section = dict.fromkeys(StageConfig.model_fields)
    left_out = section.keys() - deciding({"stage1": section})["stage1"].keys()
    assert left_out == {"log_every", "tensorboard", "save_every"}
    assert deciding({"data": {"log_every": 1}}) == {"data": {"log_every": 1}}, "stages alone have such settings"


@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_damaged_point_is_refused(damage: str, tmp_path: Path) -> None:
    trained = Trained(0)
    with trained.points(tmp_path / "point") as points:
        points.save(Progressed(7))
    if damage == "cut":
        points.path.write_bytes(points.path.read_bytes()[:200])
    else:
        trained.model = nn.Linear(4, 2)
    with trained.points(tmp_path / "point") as points, pytest.raises(CheckpointError, match="to train the stage anew"):
        points.restore()
