"""A cache of its own for every test, and pictures that can be told apart."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where indexes and converted data sets go."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qforge" / "data"


@pytest.fixture
def draw() -> Callable[[Path, int], Path]:
    """Write a picture whose colour tells its number."""

    def write(path: Path, number: int) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        colour(number).save(path)
        return path

    return write


def colour(number: int) -> Image.Image:
    return Image.new("RGB", (6, 4), (number * 10 % 256, 255 - number * 10 % 256, number))
