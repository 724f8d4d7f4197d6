"""`qforge data check` on every format it can be given as one path, and on what it cannot read."""

import json
from pathlib import Path

import pytest
from PIL import Image

from qforge.console import Outcome
from qforge.verbs_train import data_check
from runtime.errors import DataError, InputError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def check(path: Path, **options: object) -> Outcome:
    return data_check(path, **{"form": None, "split": None, "images": None, "answers": None, **options})


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "val").mkdir(parents=True)
    for number in (1, 2):
        Image.new("RGB", (4, 3), (number, 0, 0)).save(folder / f"{number}.png")
        Image.new("RGB", (4, 3), (number, 0, 0)).save(folder / f"val/COCO_val_{number:012d}.jpg")
    return folder


def test_captions_of_coco(tmp_path: Path, images: Path) -> None:
    path = tmp_path / "captions.json"
    found = [{"id": number, "file_name": f"{number}.png"} for number in (1, 2, 3)]
    said = [{"image_id": number, "caption": " " if number == 2 else "word " * 60} for number in (1, 2, 3)]
    path.write_text(json.dumps({"images": found, "annotations": said}))
    outcome = check(path, images=images)
    assert outcome.exit_code == 1
    facts = outcome.data
    counted = {key: facts[key] for key in ("format", "rows", "images", "captions", "cut", "ok")}
    assert counted == {"format": "coco", "rows": 3, "images": 2, "captions": 2, "cut": 2, "ok": False}
    empty, missing = facts["problems"]
    assert empty == f"{path}: images[1]: expected text under 'captions', found empty text"
    assert missing.startswith(f"{path}: images[2]: {images}/3.png: expected an image file, found nothing")
    assert "format: coco" in outcome.text and "2 problems:" in outcome.text


def test_pairs_of_vqav2(tmp_path: Path, images: Path) -> None:
    asked = [{"question_id": n, "image_id": n, "question": "what?"} for n in (1, 2)]
    answered = [{"question_id": n, "image_id": n, "answers": [{"answer": "it"}] * 10} for n in (1, 2)]
    (tmp_path / "q.json").write_text(json.dumps({"data_subtype": "val", "questions": asked}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": answered}))
    outcome = check(tmp_path / "q.json", answers=tmp_path / "a.json", images=images / "val")
    assert outcome.exit_code == 0 and outcome.data["answers"] == 20 and outcome.data["questions"] == 2
    (tmp_path / "a.json").write_text(json.dumps({"annotations": answered[1:]}))
    with pytest.raises(DataError, match=r"no answers to 1 of its questions \(question ids 1\)"):
        check(tmp_path / "q.json", answers=tmp_path / "a.json")


def test_one_split_or_all(tmp_path: Path, images: Path) -> None:
    found = [{"filename": f"{n}.png", "split": s, "sentences": [{"raw": "a"}]} for n, s in ((1, "train"), (2, "test"))]
    (tmp_path / "dataset.json").write_text(json.dumps({"images": found}))
    assert check(tmp_path / "dataset.json", images=images).data["rows"] == 2
    assert check(tmp_path / "dataset.json", images=images, split="test").data["rows"] == 1


def test_conversations_are_counted(tmp_path: Path, images: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"image": "images/1.png", "turns": [["what?", "red"], ["sure?", "yes"]]}\n')
    assert check(tmp_path / "m.jsonl").data["turns"] == 2


def test_a_format_by_name(tmp_path: Path, images: Path) -> None:
    (tmp_path / "rows.txt").write_text('{"image": "images/1.png", "captions": ["a"]}\n')
    assert check(tmp_path / "rows.txt", form="manifest").exit_code == 0
    with pytest.raises(DataError, match=r"rows.txt:1: expected 'image\| number\| comment'"):
        check(tmp_path / "rows.txt", form="flickr30k")
    with pytest.raises(InputError, match=r"--format: expected one of manifest, coco, .* found voc"):
        check(tmp_path / "rows.txt", form="voc")
