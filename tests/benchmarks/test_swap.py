"""Swapped images are other images, and nothing else changes."""

from pathlib import Path

import pytest

from benchmarks.swap import image_hashes, with_swapped_images
from runtime.dataset import Row
from runtime.errors import DataError, MissingFile
from tests.benchmarks.stand_ins import colour_images, question_row


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    return [
        question_row(image, question, "yes") for image in colour_images(tmp_path) for question in ("is it?", "why?")
    ]


def test_no_question_keeps_its_image(rows: list[Row]) -> None:
    hashes = image_hashes(rows)
    for seed in range(8):
        swapped = with_swapped_images(rows, hashes, seed)
        for before, after in zip(rows, swapped, strict=True):
            assert hashes[after.image] != hashes[before.image], "two files of one content count as one image"
            assert (after.question, after.answers) == (before.question, before.answers)


def test_every_content_is_used_and_the_seed_decides(rows: list[Row]) -> None:
    hashes = image_hashes(rows)
    pictures = {seed: tuple(hashes[row.image] for row in with_swapped_images(rows, hashes, seed)) for seed in range(8)}
    assert all(set(of_seed) == set(hashes.values()) for of_seed in pictures.values())
    assert len(set(pictures.values())) == 2, "three contents have two derangements"
    assert pictures[3] == tuple(hashes[row.image] for row in with_swapped_images(rows, hashes, 3))


def test_one_image_cannot_be_swapped(tmp_path: Path) -> None:
    red, *_, red_again = colour_images(tmp_path)
    rows = [question_row(red, "is it?", "yes"), question_row(red_again, "is it?", "yes")]
    with pytest.raises(DataError, match="two different images"):
        with_swapped_images(rows, image_hashes(rows), 0)


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"gone\.png"):
        image_hashes([question_row(tmp_path / "gone.png", "is it?", "yes")])
