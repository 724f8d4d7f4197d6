"""Rows and features of a step: threads that read ahead, random changes, broken rows, sets of any size and format."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from runtime.dataset import Row, read_manifest
from runtime.errors import DataError
from runtime.files import sha256_of
from runtime.preprocess import preprocess
from runtime.progress import Progress
from trainer import data as data_module
from trainer.config import ModelConfig
from trainer.data import FeatureStore, ImageRows, encode, resolve
from trainer.data_config import AugmentConfig, DataConfig
from trainer.draws import StepDraws
from trainer.pixels import PixelReader
from trainer.ranks import Ranks
from trainer.sources.rows import ManifestRows
from trainer.stage_config import Stage2Config
from trainer.stepper import Stepper
from trainer.towers import VisionTower, load_vision
from trainer.train import run_stage

QUIET = Progress(quiet=True)
CHANGES = AugmentConfig(crop_scale=(0.5, 1.0), flip=True, operations=2)


@pytest.fixture(scope="module")
def vision(model_config: ModelConfig) -> VisionTower:
    return load_vision(model_config.vision, model_config.vision_layer, model_config.image_size)


@pytest.fixture
def rows(world: Path) -> list[Row]:
    return read_manifest(world / "captions_train.jsonl")


def draws(step: int = 0, first: int = 0) -> StepDraws:
    return StepDraws((3, 0, step), first, 8)


def test_pixels_are_those_of_serving(vision: VisionTower, rows: list[Row]) -> None:
    read = PixelReader(rows, vision.preprocess, AugmentConfig()).batch([4, 2, 4], draws())
    assert [row for row, _ in read] == [rows[4], rows[2], rows[4]]
    for row, pixels in read:
        assert np.array_equal(pixels, preprocess(row.image, vision.preprocess))


def test_changes_depend_on_step_and_place_alone(vision: VisionTower, rows: list[Row]) -> None:
    def read(indices: list[int], step: int, first: int = 0, ahead: bool = False) -> list[bytes]:
        reader = PixelReader(rows, vision.preprocess, CHANGES)
        if ahead:
            reader.ahead(indices, draws(step, first))
        return [pixels.tobytes() for _, pixels in reader.batch(indices, draws(step, first))]

    whole = read([5, 5, 6, 7], step=1)
    assert whole[0] != whole[1], "one image, two places"
    assert whole == read([5, 5, 6, 7], step=1, ahead=True)
    assert whole == read([5, 5], step=1) + read([6, 7], step=1, first=2), "as one process or two"
    assert whole != read([5, 5, 6, 7], step=2)
    plain = [pixels.tobytes() for _, pixels in PixelReader(rows, vision.preprocess, CHANGES).batch([5], None)]
    assert plain == [preprocess(rows[5].image, vision.preprocess).tobytes()], "what is measured is not changed"


def test_a_step_takes_what_was_read_ahead(
    vision: VisionTower, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = PixelReader(rows, vision.preprocess, AugmentConfig())
    read, real = list[int](), PixelReader._read

    def counting(self: PixelReader, index: int, draws: StepDraws | None, b: int) -> object:
        read.append(index)
        return real(self, index, draws, b)

    monkeypatch.setattr(PixelReader, "_read", counting)
    reader.ahead([0, 1, 2], draws(1))
    reader.ahead([3, 4], draws(2))  # before the step is done, as the loop does
    reader.batch([0, 1, 2], draws(1))
    assert sorted(read[:3]) == [0, 1, 2] and set(read[3:]) <= {3, 4}
    reader.batch([4], draws(2).at([1]))  # part of the step, as a stage that mixes two sets asks for
    assert read.count(4) == 1
    reader.batch([3], draws(3))
    assert read.count(3) == 2, "another step has other changes"


def test_a_failure_in_a_thread_surfaces(vision: VisionTower, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise MemoryError("no room for the picture")

    monkeypatch.setattr("trainer.pixels.preprocess", failing)
    reader = PixelReader(rows, vision.preprocess, AugmentConfig())
    reader.ahead([0, 1], draws(1))
    with pytest.raises(MemoryError, match="no room for the picture"):
        reader.batch([0, 1], draws(1))


def test_what_is_broken_gives_way_to_the_next(vision: VisionTower, rows: list[Row], tmp_path: Path) -> None:
    lines = [{"image": str(row.image), "captions": list(row.captions)} for row in rows[:6]]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    lines[1]["image"], lines[2]["image"], lines[4]["captions"] = "broken.png", "gone.png", [" "]
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    reader = PixelReader(ManifestRows(path), vision.preprocess, CHANGES)
    read = reader.batch(range(6), draws())
    assert [row.image for row, _ in read] == [rows[i].image for i in (0, 3, 3, 3, 5, 5)]
    assert sorted(reader.broken) == [str(tmp_path / "broken.png"), str(tmp_path / "gone.png"), f"{path}:5"]
    assert "found empty text" in reader.broken[f"{path}:5"]
    for line in lines:
        line["image"] = "gone.png"
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match=r"none of 6 rows from row 2 on can be read; one says: .*gone.png"):
        PixelReader(ManifestRows(path), vision.preprocess, CHANGES).batch([2], draws())


def test_features_of_changed_images_are_made_in_the_step(vision: VisionTower, rows: list[Row]) -> None:
    changed, store = ImageRows(vision, rows, FeatureStore(), QUIET, CHANGES), FeatureStore()
    found, features_BNE = changed.batch([1, 2], draws())
    pixels = [pixels for _, pixels in PixelReader(rows, vision.preprocess, CHANGES).batch([1, 2], draws())]
    assert torch.equal(features_BNE, encode(vision, pixels))
    kept = ImageRows(vision, rows, store, QUIET)
    assert [row.image_id for row in found] == [row.image_id for row in kept.batch([1, 2], draws())[0]]
    assert not torch.equal(features_BNE, kept.batch([1, 2], draws())[1])
    torch.testing.assert_close(changed.batch([1, 2], None)[1], kept.batch([1, 2], None)[1], rtol=1e-4, atol=1e-4)
    taken = changed.take()
    assert taken.image_ids == tuple(rows[i].image_id for i in (1, 2, 1, 2)) and taken.seconds > 0


def test_a_trained_tower_gets_a_gradient(vision: VisionTower, rows: list[Row], model_config: ModelConfig) -> None:
    tower = load_vision(model_config.vision, model_config.vision_layer, model_config.image_size)
    tower.unfreeze(checkpointing=False)
    features_BNE = ImageRows(tower, rows, FeatureStore(), QUIET).batch([0, 1], draws())[1]
    assert features_BNE.requires_grad
    assert not ImageRows(vision, rows, FeatureStore(), QUIET).batch([0, 1], draws())[1].requires_grad


def test_a_large_set_is_not_looked_through(
    vision: VisionTower, rows: list[Row], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(data_module, "AHEAD_ROWS", 5)
    path = tmp_path / "m.jsonl"
    good = [json.dumps({"image": str(row.image), "captions": list(row.captions)}) for row in rows[:6]]
    path.write_text("\n".join(["{", *good, "["]))
    store = FeatureStore()
    large = ImageRows(vision, ManifestRows(path), store, QUIET)
    assert large.broken() == {}, "the wrong lines were not asked for"
    found, features_BNE = large.batch([7, 0, 1], draws())
    assert [row.image for row in found] == [rows[0].image] * 3 and features_BNE.shape[0] == 3
    assert sorted(large.broken()) == [f"{path}:1", f"{path}:8"]
    with pytest.raises(DataError, match=r"m.jsonl:1: expected one JSON object"):
        monkeypatch.setattr(data_module, "AHEAD_ROWS", 100)
        ImageRows(vision, ManifestRows(path), store, QUIET)


@pytest.mark.parametrize("largest", [5, 65_536])
def test_long_texts_are_counted_as_they_are_read(
    largest: int, vision: VisionTower, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows there are; once in a step, and not when something is measured."""
    monkeypatch.setattr(data_module, "AHEAD_ROWS", largest)
    long = Row(rows[0].image, "x", ("word " * 51, "short"), None, (), {})
    images = ImageRows(vision, [*rows, long, long], FeatureStore(), QUIET)
    first = len(rows)
    for indices, of_step, cut in (([0, first, first + 1], draws(), 2), ([first, 0, 1], draws(), 1), ([first], None, 0)):
        images.batch(indices, of_step)
        images.batch(indices, of_step)
        assert images.take().cut == cut


def test_a_recipe_mixes_formats(vision: VisionTower, world: Path, tmp_path: Path) -> None:
    """The demo world's captions as COCO JSON, mixed with its own manifest by weight."""
    shutil.copytree(world, tmp_path / "data")
    rows = read_manifest(world / "captions_train.jsonl")
    tree = {
        "images": [{"id": i, "file_name": row.image.name} for i, row in enumerate(rows)],
        "annotations": [{"image_id": i, "caption": text} for i, row in enumerate(rows) for text in row.captions],
    }
    tree["images"].append({"id": 99, "file_name": "nobody-said-anything.png"})
    (tmp_path / "data/coco.json").write_text(json.dumps(tree))
    config = DataConfig.model_validate(
        {
            "root": tmp_path / "data",
            "captions_train": [{"path": "coco.json", "images": "images", "weight": 3}, "captions_train.jsonl"],
        }
    )
    train, watched = resolve(config, tmp_path).captions()
    assert len(train) == 2 * len(rows) and len(watched) == len(read_manifest(world / "captions_val.jsonl"))
    assert [row.captions for row in train[: len(rows)]] == [row.captions for row in rows]
    images = ImageRows(vision, train, FeatureStore(), QUIET)
    assert images.left_out == 1, "a picture without captions"
    drawn = [index for step in range(64) for index in images.at_step(step, 16, seed=1)]
    assert sum(index < len(rows) for index in drawn) == 768, "three of four"
    any_rows = [images.any_row(np.random.default_rng(i)) for i in range(400)]
    assert 260 < sum(index < len(rows) for index in any_rows) < 340 and max(any_rows) < len(train)
    found, features_BNE = images.batch(images.at_step(0, 8, seed=1), draws())
    assert features_BNE.shape[0] == 8 and all(row.image.is_file() for row in found)


def test_a_picture_that_is_read_by_threads_is_read_right(vision: VisionTower, tmp_path: Path) -> None:
    rows = []
    for i in range(40):
        Image.new("RGB", (40, 30), (6 * i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append(Row(tmp_path / f"{i}.png", str(i), ("x",), None, (), {}))
    reader = PixelReader(rows, vision.preprocess, AugmentConfig())
    order = np.random.default_rng(0).permutation(40).tolist()
    for (row, pixels), index in zip(reader.batch(order, draws()), order, strict=True):
        assert row is rows[index] and np.array_equal(pixels, preprocess(row.image, vision.preprocess))


def test_augmented_training_goes_on_bit_for_bit(
    model_config: ModelConfig, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crops, mirrors and the order of a mixture are functions of the step: a killed run ends as a whole one."""
    mixed = [{"path": "captions_train.jsonl", "weight": 2}, "captions_val.jsonl"]
    config = DataConfig.model_validate({"root": world, "captions_train": mixed, "augment": CHANGES.model_dump()})
    stage = Stage2Config(steps=5, batch_size=4, warmup_steps=1, eval_every=5, eval_items=4, save_every=2)

    def train(name: str) -> str:
        out = run_stage(
            "stage2",
            model=model_config,
            data=resolve(config, tmp_path),
            config=stage,
            seed=3,
            init=None,
            out=tmp_path / name,
            recipe_yaml="{}\n",
            store=FeatureStore(),
            progress=QUIET,
            ranks=Ranks(),
        )
        return sha256_of(out / "model.safetensors")

    whole, step, steps = train("whole"), Stepper.step, list[int]()

    def dying(self: Stepper, number: int, indices: list[int], of_step: StepDraws) -> object:
        steps.append(number)
        if steps == [0, 1, 2, 3]:
            raise KeyboardInterrupt
        return step(self, number, indices, of_step)

    monkeypatch.setattr(Stepper, "step", dying)
    with pytest.raises(KeyboardInterrupt):
        train("cut")
    assert train("cut") == whole
    assert steps[4:] == [2, 3, 4], "from the resume point on"
