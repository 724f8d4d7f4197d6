"""The demo world: reproducible, disjoint by content, fair to those who do not look, and scored by what is true."""

import dataclasses
import json
from collections import Counter, defaultdict
from itertools import permutations
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from runtime.dataset import read_manifest
from runtime.dataset_check import check_manifest
from runtime.files import sha256_of
from runtime.progress import Progress
from runtime.scoring import question_prior
from trainer.data_config import DemoWorldConfig
from trainer.demo_world import scorers_for, write_demo_world
from trainer.demo_world.draw import CLUTTER, draw
from trainer.demo_world.language import (
    KIND_WEIGHTS,
    OPPOSITE,
    QuestionWriter,
    candidates,
    caption,
    caption_is_true,
    name,
)
from trainer.demo_world.scene import COLOURS, DEMO, Scene, Shape, random_scenes, relations, scene_from_json
from trainer.demo_world.vocabulary import train_language_tokenizer, train_text_tokenizer
from trainer.language import Style

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[Scene]]:
    return {split: random_scenes(600, split, seed=0, palette=DEMO) for split in SPLITS}


def test_same_seed_same_bytes(world: Path, tmp_path: Path) -> None:
    from tests.trainer.conftest import WORLD

    again = write_demo_world(WORLD, tmp_path / "again", Progress(quiet=True))
    files = sorted(path.relative_to(world) for path in world.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all(sha256_of(world / path) == sha256_of(again / path) for path in files)
    other = write_demo_world(WORLD.model_copy(update={"seed": 1}), tmp_path / "other", Progress(quiet=True))
    assert sha256_of(other / "captions_train.jsonl") != sha256_of(world / "captions_train.jsonl")


def test_same_texts_same_tokenizers(scenes: dict[str, list[Scene]]) -> None:
    """Each call draws other hash seeds inside the tokenizers library, as each process does."""
    texts = [caption(scene) for scene in scenes["train"][:60]]
    styles: tuple[Style, ...] = get_args(Style)
    made = [
        [t.get_vocab() for t in (train_text_tokenizer(texts), *(train_language_tokenizer(texts, s) for s in styles))]
        for _ in range(3)
    ]
    assert made[0] == made[1] == made[2]
    pieces = train_text_tokenizer(texts)
    assert pieces.decode(pieces("Q: is THE xylophone red?", add_special_tokens=False).input_ids) == (
        "q : is the xylophone red?"
    )


def test_written_manifests_are_valid(world: Path) -> None:
    for path in world.glob("*.jsonl"):
        assert not check_manifest(path).problems


def test_splits_share_no_content_whatever_the_seed(scenes: dict[str, list[Scene]]) -> None:
    drawn = {split: [*scenes[split], *random_scenes(300, split, seed=9, palette=DEMO)] for split in SPLITS}
    contents = {split: {scene.content() for scene in drawn[split]} for split in SPLITS}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not contents[one] & contents[other]


def test_variety(scenes: dict[str, list[Scene]]) -> None:
    drawn = scenes["train"]
    assert set(Counter(len(s.objects) for s in drawn)) == {1, 2, 3, 4}
    assert {o.colour for s in drawn for o in s.objects} == set(DEMO.colours)
    assert len(DEMO.colours) >= 8
    assert {o.shape for s in drawn for o in s.objects} == set(DEMO.shapes)
    assert {s.cluttered for s in drawn} == {True, False}
    said = " ".join(caption(s) for s in drawn)
    assert all(word in said for word in ("to the left of", "above", "below", "middle", "bottom left"))
    asked = " ".join(q.text for s in drawn[:100] for q in candidates(s, np.random.default_rng(0), DEMO))
    assert all(word in asked for word in OPPOSITE)


def test_a_picture_shows_what_its_scene_says() -> None:
    for i, scene in enumerate(random_scenes(40, "train", seed=4, palette=DEMO)):
        picture, objects = draw(scene, 128, np.random.default_rng(i))
        pixels, where = np.asarray(picture, int), np.asarray(objects)
        assert (where == CLUTTER).any() == scene.cluttered
        for number, o in enumerate(scene.objects, start=1):
            inside = where == number
            assert np.abs(np.median(pixels[inside], axis=0) - COLOURS[o.colour]).max() <= 12, name(o)
            rows, columns = np.nonzero(inside)
            assert abs(columns.mean() / 128 - o.x) < 0.03
            assert max(np.ptp(rows), np.ptp(columns)) / 256 < o.radius * 1.05


def test_captions_are_true_and_wrong_ones_are_not(scenes: dict[str, list[Scene]]) -> None:
    for scene in scenes["test"]:
        told = caption(scene)
        assert caption_is_true(told, scene)
        words = told.split()
        for i, word in enumerate(words):
            for group in (DEMO.colours, DEMO.shapes, ("small", "large"), ("above", "below"), ("left", "right")):
                if word in group:
                    wrong = group[(group.index(word) + 1) % len(group)]
                    changed = " ".join([*words[:i], wrong, *words[i + 1 :]])
                    assert not caption_is_true(changed, scene) or _says_the_same(changed, scene)
        assert not caption_is_true("", scene)
        assert not caption_is_true(caption(scene) + " and a small red circle", scene)


def _says_the_same(caption: str, scene: Scene) -> bool:
    """Two like objects may be named in either order: "a left of b" and "a right of b" are then both true."""
    return len(scene.objects) == 2 and name(scene.objects[0]) == name(scene.objects[1])


def test_order_of_an_enumeration_is_free(scenes: dict[str, list[Scene]]) -> None:
    scene = next(s for s in scenes["test"] if len(s.objects) == 3)
    a, b, c = (f"a {name(o)}" for o in scene.objects)
    assert caption_is_true(f"{c}, {a} and {b}", scene)
    assert not caption_is_true(f"{a} and {b}", scene)


def test_every_question_has_one_right_answer(scenes: dict[str, list[Scene]]) -> None:
    for scene in scenes["train"][:150]:
        answers = defaultdict(set)
        for question in candidates(scene, np.random.default_rng(0), DEMO):
            answers[question.text].add(question.answer)
        assert all(len(found) == 1 for found in answers.values())
        assert {q.kind for q in candidates(scene, np.random.default_rng(0), DEMO)} <= set(KIND_WEIGHTS)


def test_relations_are_opposite() -> None:
    for scene in random_scenes(200, "train", seed=5, palette=DEMO):
        for first, second in permutations(scene.objects, 2):
            assert relations(second, first) == tuple(OPPOSITE[there] for there in relations(first, second))


def test_a_relation_is_judged_along_its_own_axis() -> None:
    blue, red = (Shape("star", colour, "small", x, y, 0.08) for colour, x, y in (("blue", 0.2, 0.3), ("red", 0.6, 0.7)))
    scene = Scene((blue, red), cluttered=False)
    for where in ("to the left of", "above"):
        assert caption_is_true(f"a small blue star {where} a small red star", scene)
        assert not caption_is_true(f"a small red star {where} a small blue star", scene)
    level = Scene((blue, dataclasses.replace(red, y=0.35)), cluttered=False)
    assert relations(*level.objects) == ("to the left of",)
    assert not any("above" in q.text or "below" in q.text for q in candidates(level, np.random.default_rng(0), DEMO))


def test_wording_alone_answers_less_than_half(tmp_path: Path) -> None:
    config = DemoWorldConfig(train_scenes=1500, val_scenes=10, test_scenes=300, image_size=8)
    world = write_demo_world(config, tmp_path / "world", Progress(quiet=True))
    train, test = read_manifest(world / "vqa_train.jsonl"), read_manifest(world / "vqa_test.jsonl")
    assert question_prior(train, test) <= 0.5
    kinds = Counter(row.extra["kind"] for row in test)
    assert set(kinds) == set(KIND_WEIGHTS)
    for kind in ("existence", "relation", "yes/no", "size"):
        shares = Counter(row.answers[0] for row in train if row.extra["kind"] == kind)
        assert len(shares) == 2
        assert min(shares.values()) / max(shares.values()) > 0.9


def test_asked_questions_differ() -> None:
    writer = QuestionWriter(0, DEMO)
    for scene in random_scenes(50, "train", seed=1, palette=DEMO):
        asked = writer.ask(scene, 6)
        assert len({q.text for q in asked}) == len(asked)


def test_scene_round_trip_and_scorer_choice(world: Path) -> None:
    rows = read_manifest(world / "captions_test.jsonl")
    scene = scene_from_json(json.loads(json.dumps(rows[0].extra["scene"])))
    score = scorers_for(rows)["attributes_right"]
    assert score(caption(scene), rows[0]) == 1.0
    assert score("a picture", rows[0]) == 0.0
    assert scorers_for(read_manifest(world / "vqa_test.jsonl")) == {}


def test_pictures_have_the_asked_size(world: Path) -> None:
    with Image.open(world / "images" / "train-00000.png") as picture:
        assert picture.size == (32, 32)
        assert picture.mode == "RGB"
