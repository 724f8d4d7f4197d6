"""The emoji bench on pictures whose neighbours are known, and in its smallest size from manifest to result."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import emoji
from benchmarks.emoji import category_scores, main, name_scores, neighbours
from runtime.dataset import Row, read_manifest
from tests.in_process import qforge_in_process
from trainer.blip2 import Blip2, new_blip2
from trainer.config import ModelConfig

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (30, 60, 220)}
HELD = {"train": (0, 1, 3, 5), "val": (2, 4)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of a stripe in three colours, transparent as emoji are; the colour is the category.

    Every held-out stripe overlaps one of its colour that is trained on.
    """
    root = tmp_path_factory.mktemp("emoji")
    for split, numbers in HELD.items():
        rows = []
        for category, colour in COLOURS.items():
            for number in numbers:
                pixels = np.zeros((32, 32, 4), np.uint8)
                pixels[:, 4 * number : 4 * number + 8] = (*colour, 255)
                name = f"{category}-{number}"
                Image.fromarray(pixels).save(root / f"{name}.png")
                caption = f"{category} stripe {number}"
                rows.append({"image": f"{name}.png", "image_id": name, "captions": [caption], "category": category})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (root / f"captions_{split}.jsonl").write_text(text)
    return root


@pytest.fixture(scope="module")
def splits(folder: Path) -> tuple[list[Row], list[Row]]:
    return read_manifest(folder / "captions_train.jsonl"), read_manifest(folder / "captions_val.jsonl")


@pytest.fixture(scope="module")
def model() -> Blip2:
    torch.manual_seed(0)
    return new_blip2(ModelConfig(qformer={"width": 32, "layers": 1, "heads": 2, "ffn_width": 32}), False)


def test_a_picture_is_its_own_nearest_neighbour(model: Blip2, splits: tuple[list[Row], list[Row]]) -> None:
    train, _ = splits
    for name, scores in neighbours(model, train, train).items():
        assert scores.shape == (len(train), len(train))
        assert np.abs(scores).max() <= 1 + 1e-5
        if name != "nearest name (ITC)":
            assert scores.argmax(1).tolist() == list(range(len(train))), name


def test_names_are_compared_by_the_best_of_the_queries(model: Blip2, splits: tuple[list[Row], list[Row]]) -> None:
    train, val = splits
    from trainer.retrieval import EagerRetrieval

    retriever = EagerRetrieval(model)
    image_QF = retriever.embed_images([val[1].image]).features_BQF[0]
    text_F = retriever.embed_texts([train[2].captions[0]])[0]
    found = neighbours(model, train, val)["nearest name (ITC)"][1, 2]
    assert found == pytest.approx(float((image_QF @ text_F).max()), abs=1e-5)


def test_categories_come_from_neighbours_and_the_majority_from_training(splits: tuple[list[Row], list[Row]]) -> None:
    train, val = splits
    of = {row.image_id: row for row in train}
    nearest = {"mine": [of["red-0"], of["blue-0"], *[of["green-1"]] * 2, of["blue-1"], of["blue-3"]]}
    scores = category_scores(nearest, [*train, of["green-0"]], val)
    assert [row.extra["category"] for row in val] == ["red", "red", "green", "green", "blue", "blue"]
    assert scores["mine"]["accuracy"] == pytest.approx(5 / 6)
    assert scores["mine"]["standard_error"] == pytest.approx((5 / 6 * 1 / 6 / 6) ** 0.5)
    assert scores["majority"]["accuracy"] == pytest.approx(2 / 6)


def test_names_are_scored_exactly_and_by_words(splits: tuple[list[Row], list[Row]]) -> None:
    _, val = splits
    right = [row.captions[0] for row in val]
    all_right = name_scores(right, val)
    one_wrong = name_scores(["nothing", *right[1:]], val)
    assert all_right["exact_match"] == 1
    assert one_wrong["exact_match"] == pytest.approx(5 / 6)
    assert one_wrong["CIDEr"] < all_right["CIDEr"]


def test_from_manifest_to_result(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji, "qforge", qforge_in_process)
    small = [
        f"{stage}.{key}={value}"
        for stage in ("stage1", "stage2")
        for key, value in {"steps": 2, "batch_size": 4, "eval_every": 2, "eval_items": 4, "warmup_steps": 1}.items()
    ]
    small += ["data.holdout=0.3", "model.qformer.width=32", "model.qformer.ffn_width=32", "model.qformer.layers=1"]
    overrides = [word for override in small for word in ("--set", override)]
    main(["--data", str(folder), "--work", str(tmp_path / "w"), "--out", str(tmp_path / "r.json"), *overrides])
    result: dict[str, Any] = json.loads((tmp_path / "r.json").read_text())
    assert result["items"] == {"train": 12, "val": 6}
    assert result["settings"] == small
    assert set(result["held_out"]) == {"stage1", "stage2"}
    assert set(result["categories"]) == {"majority", *set(result["names"]) - {"generated"}}
    assert result["categories"]["nearest image (pixels)"]["accuracy"] == 1
    assert result["chance_r1"] == pytest.approx(1 / 6)
    assert result["said"][0]["name"] == "red stripe 2"
