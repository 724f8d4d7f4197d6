"""Every family of published models, saved and imported once per test run."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qforge.cli import app
from runtime.preprocess import preprocess_batch
from tests.published import FAMILIES, Family, write_published
from tests.traces import shared_operators as shared_operators
from trainer.blip2 import Blip2
from trainer.checkpoint import load_checkpoint

IMAGES = 20


@dataclass(frozen=True)
class Case:
    """A published model and what our import made of it."""

    name: str
    family: Family
    source: Path
    """The folder as its users have it."""
    checkpoint: Path
    theirs: Any
    ours: Blip2


def qforge(*arguments: str | Path) -> int:
    """Exit code of one command, run in this process."""
    code: int = app([str(argument) for argument in arguments], prog_name="qforge", standalone_mode=False)
    return code


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """A family by name."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("published")

    @cache
    def made(name: str) -> Case:
        source, checkpoint = root / name, root / f"{name}-checkpoint"
        theirs = write_published(source, FAMILIES[name])
        assert qforge("import", source, "--out", checkpoint) == 0
        return Case(name, FAMILIES[name], source, checkpoint, theirs, load_checkpoint(checkpoint))

    return made


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Different noise and colour in each."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, size=(20 + n, 33, 3), dtype=np.uint8)) for n in range(IMAGES)]


def pixels_for(model: Blip2, pictures: list[Image.Image]) -> torch.Tensor:
    """Pixels [B, 3, H, W] as our runtime makes them."""
    return torch.from_numpy(preprocess_batch(pictures, model.preprocess))
