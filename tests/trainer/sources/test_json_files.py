"""COCO, Karpathy, VQAv2, LAVIS, LLaVA and Flickr30k files as their own readers see them, and some that are wrong."""

import json
from pathlib import Path

import pytest
from pycocotools.coco import COCO

from runtime.dataset import Row, parse_row
from runtime.errors import DataError, MissingFile
from trainer.sources.convert import as_manifest, entries_of, read_rows
from trainer.sources.detect import format_of
from trainer.sources.rows import ManifestRows
from trainer.sources.source import Source


def rows_of(source: Source) -> list[Row]:
    return list(ManifestRows(as_manifest([source])))


def write(path: Path, tree: object, indent: int | None = None) -> Path:
    path.write_text(json.dumps(tree, indent=indent))
    return path


COCO_TREE = {
    "info": {"year": 2017},
    "images": [{"id": 9, "file_name": "000009.jpg"}, {"id": 4, "file_name": "000004.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 4, "caption": "A dog.\n"},
        {"id": 2, "image_id": 9, "caption": "Two cats"},
        {"id": 3, "image_id": 4, "caption": "a brown dog"},
    ],
}


@pytest.mark.parametrize("indent", [None, 1])
def test_coco_captions_are_those_of_pycocotools(tmp_path: Path, indent: int | None) -> None:
    path = write(tmp_path / "captions_val2017.json", COCO_TREE, indent)
    assert format_of(path) == "coco"
    coco = COCO(str(path))
    rows = rows_of(Source(path, images=tmp_path / "val2017"))
    assert {row.image_id for row in rows} == {str(number) for number in coco.getImgIds()}
    for row in rows:
        number = int(row.image_id)
        found = coco.loadAnns(coco.getAnnIds(imgIds=[number]))
        assert sorted(row.captions) == sorted(annotation["caption"] for annotation in found)
        assert row.image == tmp_path / "val2017" / coco.loadImgs([number])[0]["file_name"]
    assert [row.image_id for row in rows] == ["9", "4"]


def test_coco_files_that_do_not_fit(tmp_path: Path) -> None:
    astray = write(tmp_path / "a.json", COCO_TREE | {"images": COCO_TREE["images"][:1]})
    with pytest.raises(DataError, match=r"a.json: expected every annotation's image_id .* found 1 that are not: 4"):
        rows_of(Source(astray))
    boxes = write(tmp_path / "b.json", COCO_TREE | {"annotations": [{"id": 1, "image_id": 4, "bbox": [0, 0, 1, 1]}]})
    with pytest.raises(DataError, match=r"b.json: expected annotations with 'caption' \(a captions file\)"):
        rows_of(Source(boxes))
    odd = write(tmp_path / "c.json", COCO_TREE | {"images": [{"id": 4}]})
    with pytest.raises(DataError, match=r"c.json: expected the coco format, .*KeyError: 'file_name'"):
        rows_of(Source(odd))


def karpathy(filepath: str | None) -> dict[str, object]:
    def image(number: int, split: str) -> dict[str, object]:
        found = {"filename": f"{number}.jpg", "split": split, "sentences": [{"raw": f"text {number}", "tokens": []}]}
        return found | ({"filepath": filepath, "cocoid": number} if filepath else {})

    return {"images": [image(1, "train"), image(2, "restval"), image(3, "test"), image(4, "train")], "dataset": "x"}


def test_karpathy_splits(tmp_path: Path) -> None:
    path = write(tmp_path / "dataset_coco.json", karpathy("val2014"))
    assert format_of(path) == "karpathy"
    assert [row.image_id for row in rows_of(Source(path, split="train"))] == ["1", "4"]
    assert [row.image_id for row in rows_of(Source(path, split="train+restval"))] == ["1", "2", "4"]
    (row,) = rows_of(Source(path, split="test", images=tmp_path / "coco"))
    assert row.image == tmp_path / "coco/val2014/3.jpg" and row.captions == ("text 3",)
    flickr = write(tmp_path / "dataset_flickr30k.json", karpathy(None))
    assert rows_of(Source(flickr, split="test"))[0].image == tmp_path / "3.jpg"
    with pytest.raises(DataError, match=r"expected a split to be named, as it has 3 \(restval, test, train\)"):
        rows_of(Source(path))
    with pytest.raises(DataError, match="expected the split 'val', found restval, test, train"):
        rows_of(Source(path, split="val"))


QUESTIONS = {
    "data_subtype": "train2014",
    "questions": [
        {"image_id": 458752, "question": "What is this?", "question_id": 458752000},
        {"image_id": 458752, "question": "What colour?", "question_id": 458752001},
    ],
}


def annotations() -> dict[str, list[dict[str, object]]]:
    answers = [[{"answer": "net", "answer_id": i + 1} for i in range(10)], [{"answer": "red"}, {"answer": "blue"}]]
    return {
        "annotations": [
            {"question_id": q["question_id"], "image_id": q["image_id"], "answers": given}
            for q, given in zip(QUESTIONS["questions"], answers, strict=True)
        ]
    }


def test_vqav2_keeps_every_answer(tmp_path: Path) -> None:
    path, answers = write(tmp_path / "q.json", QUESTIONS), write(tmp_path / "a.json", annotations())
    assert format_of(path) == "vqav2"
    first, second = rows_of(Source(path, answers=answers, images=tmp_path / "train2014"))
    assert first.image == tmp_path / "train2014/COCO_train2014_000000458752.jpg"  # as the data set is distributed
    assert first.answers == ("net",) * 10 and second.answers == ("red", "blue")
    assert (first.question, first.image_id, first.extra) == ("What is this?", "458752", {"question_id": 458752000})
    assert [row.answers for row in rows_of(Source(path))] == [(), ()], "a test split has none"


def test_wrong_pairs_name_the_questions(tmp_path: Path) -> None:
    path = write(tmp_path / "q.json", QUESTIONS)

    def refusal(name: str, found: object) -> str:
        with pytest.raises(DataError) as caught:
            rows_of(Source(path, answers=write(tmp_path / name, found)))
        return str(caught.value)

    fewer = {"annotations": annotations()["annotations"][:1]}
    assert (
        "a.json: expected the annotations of q.json, found no answers to 1 of its questions (question ids 458752001)"
        in refusal("a.json", fewer)
    )
    others = annotations()
    others["annotations"].append({"question_id": 7, "image_id": 1, "answers": []})
    assert "found answers to 1 questions it does not ask (question ids 7)" in refusal("b.json", others)
    moved = annotations()
    moved["annotations"][0]["image_id"] = 1
    assert "found another image_id for 1 of its questions (question ids 458752000)" in refusal("c.json", moved)
    swapped = write(tmp_path / "annotations.json", annotations())
    with pytest.raises(
        DataError, match=r"annotations.json: .* found keys \['annotations'\]; name this file as `answers`"
    ):
        rows_of(Source(swapped, format="vqav2"))


def test_lavis_and_llava_records(tmp_path: Path) -> None:
    path = write(
        tmp_path / "records.json",
        [
            {"image": "1.jpg", "caption": "a dog", "image_id": "coco_1"},
            {"image": "2.jpg", "question": "how many?", "question_id": 3, "answer": ["2", "two"], "dataset": "vqa"},
            {
                "id": "x",
                "image": "3.jpg",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is it?"},
                    {"from": "gpt", "value": "A cat."},
                    {"from": "human", "value": "Which colour?"},
                    {"from": "gpt", "value": "Grey."},
                ],
            },
            {"id": "y", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
            {"image": "4.jpg", "conversations": [{"from": "gpt", "value": "hello"}]},
        ],
    )
    assert format_of(path) == "records"
    found = [row for _, row in entries_of(Source(path))]
    caption, question, dialogue = (row for row in found[:3] if isinstance(row, Row))
    assert (caption.captions, caption.image_id, caption.image) == (("a dog",), "coco_1", tmp_path / "1.jpg")
    assert (question.question, question.answers, question.extra["dataset"]) == ("how many?", ("2", "two"), "vqa")
    assert dialogue.turns == (("What is it?", "A cat."), ("Which colour?", "Grey."))
    assert [str(error) for error in found[3:]] == [
        f"{path}: [3]: expected the key 'image' with a path, found keys ['id', 'turns']",
        f"{path}: [4]: expected messages from 'human' and 'gpt' in turn under 'conversations', found [\"gpt\"]",
    ]
    assert [row.image.name for row in read_rows(path)] == ["1.jpg", "2.jpg", "3.jpg"]


def test_turns_of_a_manifest(tmp_path: Path) -> None:
    row = parse_row('{"image": "a.png", "turns": [["q", "a"], ["r", "b"]]}', "f:1", tmp_path)
    assert row.turns == (("q", "a"), ("r", "b")) and row.question is None
    for turns in ('"q"', '["q"]', '[["q"]]', '[["q", 1]]', '[["q", " "]]'):
        with pytest.raises(DataError, match=r"^f:1: expected .* under 'turns'"):
            parse_row(f'{{"image": "a.png", "turns": {turns}}}', "f:1", tmp_path)


def test_flickr30k(tmp_path: Path) -> None:
    csv = tmp_path / "results.csv"
    csv.write_text(
        "image_name| comment_number| comment\n1.jpg| 0| Two men .\n1.jpg| 1| Men , young .\n2.jpg| 0| A dog\n"
    )
    token = tmp_path / "results_20130124.token"
    token.write_text("1.jpg#0\tTwo men .\n1.jpg#1\tMen , young .\n2.jpg#0\tA dog\n")
    for path in (csv, token):
        assert format_of(path) == "flickr30k"
        first, second = rows_of(Source(path, images=tmp_path / "images"))
        assert (first.captions, second.captions) == (("Two men .", "Men , young ."), ("A dog",))
        assert first.image == tmp_path / "images/1.jpg"
    csv.write_text("1.jpg| 0| fine\n1.jpg| 1\n")
    with pytest.raises(DataError, match=r"results.csv:2: expected 'image\| number\| comment'"):
        rows_of(Source(csv))


def test_what_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"none.json: expected a data set"):
        format_of(tmp_path / "none.json")
    with pytest.raises(DataError, match=r"found JSON with \['a'\]"):
        format_of(write(tmp_path / "odd.json", {"a": 1}, 1))
    (tmp_path / "cut.json").write_text('[{"image": ')
    with pytest.raises(DataError, match="expected JSON, found text that is none"):
        format_of(tmp_path / "cut.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="expected a folder of tar shards"):
        format_of(tmp_path / "empty")
    with pytest.raises(DataError, match=r"at least one usable row, found none; the first says: .*'image'"):
        read_rows(write(tmp_path / "blind.json", [{"caption": "x"}]))
