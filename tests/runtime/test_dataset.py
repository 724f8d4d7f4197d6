"""The manifest reader says which line is wrong, and the check finds what would spoil a training run."""

import json

import numpy as np
import pytest
from PIL import Image

from runtime.dataset import read_manifest
from runtime.dataset_check import check_manifest
from runtime.errors import DataError, MissingFile


@pytest.fixture
def write(tmp_path):
    """Write rows (dicts, or lines as they are) to a manifest."""

    def write_rows(*rows, name="data.jsonl", encoding="utf-8"):
        path = tmp_path / name
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        path.write_text(text, encoding=encoding)
        return path

    return write_rows


def draw(path, mode="RGB"):
    path.parent.mkdir(exist_ok=True)
    Image.new(mode, (4, 3)).save(path)


def test_reads_captions_and_questions(write, tmp_path):
    path = write(
        {"image": "images/1.png", "image_id": "one", "captions": ["a red circle", "red"], "scene": {"n": 1}},
        "",
        {"image": "images/1.png", "image_id": "one", "question": "what colour?", "answers": ["red"]},
        {"image": "images/2.png", "image_id": 7, "question": "unanswered?"},
        {"image": "images/3.png", "captions": ["three"]},
    )
    first, second, third, fourth = read_manifest(path)
    assert first.image == tmp_path / "images/1.png" and first.image.is_absolute()
    assert (first.image_id, first.captions, first.question) == ("one", ("a red circle", "red"), None)
    assert first.extra == {"scene": {"n": 1}} and second.extra == {}
    assert (second.question, second.answers, second.captions) == ("what colour?", ("red",), ())
    assert (third.image_id, third.answers) == ("7", ())
    assert fourth.image_id == "images/3.png"


def test_relative_manifest_gives_absolute_images(write, tmp_path, monkeypatch):
    write({"image": "a.png", "captions": ["x"]})
    monkeypatch.chdir(tmp_path)
    assert read_manifest("data.jsonl")[0].image == tmp_path / "a.png"


def test_a_byte_order_mark_is_dropped(write):
    assert len(read_manifest(write({"image": "ü.png", "captions": ["x"]}, encoding="utf-8-sig"))) == 1


GOOD = {"image": "a.png", "captions": ["x"]}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "expected one JSON object, found '{'"),
        ("[1]", "expected one JSON object, found list"),
        ({"captions": ["x"]}, "expected the key 'image'"),
        ({"image": "", "captions": ["x"]}, "expected text under 'image', found empty text"),
        ({"image": 3, "captions": ["x"]}, "expected text under 'image', found 3"),
        ({"image": "a.png"}, "expected 'captions' or a 'question'"),
        ({"image": "a.png", "captions": []}, "expected 'captions' or a 'question'"),
        ({"image": "a.png", "captions": "x"}, "expected a list of texts under 'captions'"),
        ({"image": "a.png", "captions": ["x", " "]}, "under 'captions', found empty text"),
        ({"image": "a.png", "captions": [None]}, "expected text under 'captions', found null"),
        ({"image": "a.png", "question": "  "}, "under 'question', found empty text"),
        ({"image": "a.png", "question": "q", "answers": [2]}, "expected text under 'answers', found 2"),
        ({"image": "a.png", "captions": ["x"], "answers": ["y"]}, "expected a 'question' beside 'answers'"),
        ({"image": "a.png", "image_id": True, "captions": ["x"]}, "expected text under 'image_id', found true"),
    ],
)
def test_a_wrong_line_is_named(write, line, sentence):
    path = write(GOOD, line)
    with pytest.raises(DataError) as caught:
        read_manifest(path)
    assert str(caught.value).startswith(f"{path}:2: ") and sentence in str(caught.value)


def test_files_that_are_no_manifest(write, tmp_path):
    with pytest.raises(DataError, match="empty data set"):
        read_manifest(write(""))
    with pytest.raises(DataError, match="empty data set"):
        check_manifest(write(""))
    with pytest.raises(MissingFile, match=r"none\.jsonl"):
        read_manifest(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="found a folder"):
        read_manifest(tmp_path)
    with pytest.raises(DataError, match="expected UTF-8"):
        read_manifest(write({"image": "a.png", "captions": ["x"]}, encoding="utf-16"))


def test_check_of_a_good_set(write, tmp_path):
    draw(tmp_path / "images/1.png")
    draw(tmp_path / "images/2.png", "RGBA")
    Image.new("P", (2, 2)).save(tmp_path / "images/3.png", transparency=0)
    Image.fromarray(np.zeros((2, 2), np.uint16)).save(tmp_path / "images/4.png")
    told = []
    report = check_manifest(
        write(
            {"image": "images/1.png", "image_id": "1", "captions": ["a", "b"]},
            {"image": "images/1.png", "image_id": "1", "question": "q", "answers": ["x", "y", "z"]},
            {"image": "images/1.png", "image_id": "1", "question": "r", "answers": ["x"]},
            *({"image": f"images/{n}.png", "image_id": str(n), "captions": ["c"]} for n in (2, 3, 4)),
        ),
        progress=lambda done, total: told.append((done, total)),
    )
    assert report.ok and report.problems == ()
    assert (report.rows, report.images, report.captions, report.questions, report.answers) == (6, 4, 5, 2, 4)
    assert report.modes == {"I;16": 1, "P + transparency": 1, "RGB": 1, "RGBA + transparency": 1}
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert json.loads(json.dumps(report.as_json()))["ok"] is True


def test_check_finds_every_problem(write, tmp_path):
    draw(tmp_path / "images/1.png")
    broken = tmp_path / "images/broken.bmp"
    Image.new("RGB", (4, 3)).save(broken)
    broken.write_bytes(broken.read_bytes()[:-20])
    path = write(
        {"image": "images/1.png", "image_id": "1", "captions": ["a"]},
        {"image": "images/1.png", "image_id": "1", "captions": ["b"]},
        {"image": "images/1.png", "image_id": "1", "question": "q", "answers": ["x"]},
        {"image": "images/1.png", "image_id": "1", "question": "q", "answers": ["y"]},
        {"image": "images/none.png", "image_id": "2", "captions": [" "]},
        {"image": "images/none.png", "image_id": "2", "captions": ["a"]},
        {"image": "images/broken.bmp", "image_id": "1", "question": "r"},
    )
    report = check_manifest(path)
    assert not report.ok and report.rows == 7
    expected = [
        (5, "under 'captions', found empty text"),
        (2, f"found captions of image_id '1' already at {path}:1"),
        (4, f"found question 'q' of image_id '1' already at {path}:3"),
        (7, f"expected one image file per image_id, found '1' for another file at {path}:1"),
        (6, "none.png: expected an image file, found nothing under that name"),
        (7, "broken.bmp: the image is truncated or damaged"),
    ]
    assert len(report.problems) == len(expected)
    for problem, (line, sentence) in zip(report.problems, expected, strict=True):
        assert problem.startswith(f"{path}:{line}: ") and sentence in problem
