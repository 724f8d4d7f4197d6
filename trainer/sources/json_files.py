"""The field's JSON files, each as the records of a manifest with the place they were found at.

COCO captions (cocodataset.org's format), Karpathy's splits of COCO and Flickr30k, VQAv2's questions with their
annotations, and lists of records: LAVIS' (`image`, `caption` | `question`, `answer`) and LLaVA's (`conversations`).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.errors import DataError, MissingFile
from trainer.sources.record import Entry
from trainer.sources.source import Source, chosen_splits

SHOWN = 5
"""Ids named in a message about many."""


def read_json(path: Path) -> Any:
    """The whole file; DataError when it is no JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise MissingFile(f"{path}: expected a JSON file, found nothing under that name") from error
    except ValueError as error:
        raise DataError(f"{path}: expected JSON, found text that is none ({error})") from error


def coco_entries(source: Source) -> Iterator[Entry]:
    """One row per image, with all its captions, in the order of `images`."""
    tree = _with_keys(source.path, "images", "annotations")
    captions: dict[Any, list[str]] = {}
    for annotation in tree["annotations"]:
        if "caption" not in annotation:
            raise DataError(
                f"{source.path}: expected annotations with 'caption' (a captions file), found {sorted(annotation)}"
            )
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    for number, image in enumerate(tree["images"]):
        texts = captions.pop(image["id"], [])
        yield f"{source.path}: images[{number}]", _image_record(image["file_name"], image["id"], texts)
    if captions:
        raise DataError(
            f"{source.path}: expected every annotation's image_id among 'images', found {len(captions)} that are not: "
            f"{_some(captions)}"
        )


def karpathy_entries(source: Source) -> Iterator[Entry]:
    """One row per image of the wanted splits; COCO's images lie in folders (`filepath`), Flickr30k's do not."""
    images = _with_keys(source.path, "images")["images"]
    wanted = chosen_splits(source, (image["split"] for image in images))
    for number, image in enumerate(images):
        if image["split"] in wanted:
            name = f"{image['filepath']}/{image['filename']}" if image.get("filepath") else image["filename"]
            number_or_name = image.get("cocoid", name)
            texts = [sentence["raw"] for sentence in image["sentences"]]
            yield f"{source.path}: images[{number}]", _image_record(name, number_or_name, texts)


def vqav2_entries(source: Source) -> Iterator[Entry]:
    """One row per question; its ten answers all stay, as how often each was given is what soft targets are made of."""
    questions = _with_keys(source.path, "questions", instead=("annotations", "as `answers`"))
    answers = None if source.answers is None else _answers(source.path, questions["questions"], source.answers)
    subtype = questions.get("data_subtype", "")
    for number, asked in enumerate(questions["questions"]):
        record = {
            "image": asked.get("image") or f"COCO_{subtype}_{asked['image_id']:012d}.jpg",
            "image_id": asked["image_id"],
            "question": asked["question"],
            "answers": answers[asked["question_id"]] if answers is not None else [],
            "question_id": asked["question_id"],
        }
        yield f"{source.path}: questions[{number}]", record


def record_entries(source: Source) -> Iterator[Entry]:
    """A list of objects that say `image` and a text."""
    records = read_json(source.path)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError(f"{source.path}: expected a list of objects, found {type(records).__name__}")
    for number, record in enumerate(records):
        yield f"{source.path}: [{number}]", record


def _answers(path: Path, questions: list[dict[str, Any]], annotations_path: Path) -> dict[Any, list[str]]:
    """Answers by question id, checked to be those of these questions."""
    annotations = _with_keys(annotations_path, "annotations", instead=("questions", "as `path`"))["annotations"]
    asked = {question["question_id"]: question["image_id"] for question in questions}
    answered = {annotation["question_id"]: annotation for annotation in annotations}
    for what, ids in (
        ("no answers to {} of its questions", asked.keys() - answered.keys()),
        ("answers to {} questions it does not ask", answered.keys() - asked.keys()),
    ):
        if ids:
            raise DataError(
                f"{annotations_path}: expected the annotations of {path.name}, found {what.format(len(ids))} "
                f"(question ids {_some(ids)}); pair the files of one split"
            )
    elsewhere = [number for number, image_id in asked.items() if answered[number]["image_id"] != image_id]
    if elsewhere:
        raise DataError(
            f"{annotations_path}: expected the annotations of {path.name}, found another image_id for "
            f"{len(elsewhere)} of its questions (question ids {_some(elsewhere)}); pair the files of one split"
        )
    return {number: [given["answer"] for given in found["answers"]] for number, found in answered.items()}


def _with_keys(path: Path, *keys: str, instead: tuple[str, str] | None = None) -> dict[str, Any]:
    """A JSON object that has lists under `keys`; `instead`: (key of another file of the pair, what that one is)."""
    tree = read_json(path)
    found = sorted(tree) if isinstance(tree, dict) else []
    absent = [key for key in keys if not isinstance(tree, dict) or not isinstance(tree.get(key), list)]
    if absent:
        hint = f"; name this file {instead[1]}" if instead is not None and instead[0] in found else ""
        what = f"keys {found}" if isinstance(tree, dict) else type(tree).__name__
        raise DataError(f"{path}: expected an object with a list under {absent[0]!r}, found {what}{hint}")
    assert isinstance(tree, dict)
    return tree


def _image_record(image: str, image_id: object, captions: list[str]) -> dict[str, Any]:
    return {"image": image, "image_id": image_id, "captions": captions}


def _some(ids: Any) -> str:
    listed = sorted(ids)[:SHOWN]
    return ", ".join(map(str, listed)) + (", …" if len(ids) > SHOWN else "")
