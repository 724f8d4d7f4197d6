"""A tiny world on disk and tiny halves, made once per test run."""

from pathlib import Path

import pytest

from runtime.progress import Progress
from tests.tiny import write_tiny_halves
from trainer.config import ModelConfig
from trainer.data import ResolvedData, resolve
from trainer.data_config import DataConfig, DemoWorldConfig
from trainer.demo_world import write_demo_world

WORLD = DemoWorldConfig(train_scenes=48, val_scenes=12, test_scenes=12, questions_per_scene=3, image_size=32)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the demo manifests."""
    return write_demo_world(WORLD, tmp_path_factory.mktemp("world") / "data", Progress(quiet=True))


@pytest.fixture(scope="session")
def data(world: Path) -> ResolvedData:
    return resolve(DataConfig(), world)


@pytest.fixture(scope="session")
def model_config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return write_tiny_halves(tmp_path_factory.mktemp("halves"))
