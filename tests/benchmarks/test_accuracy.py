"""Scores and agreement against values counted by hand."""

import json
from pathlib import Path

import pytest

from benchmarks.accuracy import agreement, answer_tasks, compare_answers, swap_images
from benchmarks.contestants import Capped
from benchmarks.items import Tasks, answer_lines, fitting, spread
from benchmarks.swap import image_hashes
from runtime.answers import Answer, Request
from runtime.dataset import Row
from runtime.progress import Progress
from runtime.scoring import question_prior
from tests.alive import Alive
from tests.benchmarks.stand_ins import Parrot, caption_row, colour_images, contestant, question_row
from trainer.sources.rows import ManifestRows

QUIET = Progress(quiet=True)


@pytest.fixture
def tasks(tmp_path: Path) -> Tasks:
    red, green, blue, _ = colour_images(tmp_path)
    return {
        "vqa": [
            question_row(red, "what colour?", "red", kind="colour"),
            question_row(green, "what colour?", "green", kind="colour"),
            question_row(blue, "what colour?", "blue", kind="colour"),
            question_row(red, "is it red?", "yes", kind="yes/no"),
            question_row(green, "is it red?", "no", kind="yes/no"),
        ],
        "caption": [caption_row(red, "red", "a red circle"), caption_row(green, "a green circle")],
    }


@pytest.fixture
def train() -> list[Row]:
    """Questions whose answers, without looking, are most often red and no."""
    asked = [("what colour?", "red"), ("what colour?", "red"), ("what colour?", "blue"), ("is it red?", "no")]
    return [question_row(Path("train.png"), question, answer) for question, answer in asked]


def compared(tasks: Tasks, train: list[Row]) -> dict:
    contestants = [
        contestant("eager", Parrot(instead={"is it red?": "yes"})),
        contestant("bundle", Parrot(instead={"is it red?": "no", None: "a circle"})),
    ]
    arguments = {"batch_size": 2, "max_new_tokens": 8, "progress": QUIET}
    scored = answer_tasks(contestants, tasks, remark="", **arguments)
    hashes = image_hashes([row for rows in tasks.values() for row in rows])
    swapped = answer_tasks(contestants, swap_images(tasks, hashes, seed=0), remark=", swapped", **arguments)
    return compare_answers(tasks, scored, swapped, train, seed=0)


def test_questions(tasks: Tasks, train: list[Row]) -> None:
    vqa = compared(tasks, train)["vqa"]
    eager, bundle = vqa["pipelines"]["eager"], vqa["pipelines"]["bundle"]
    assert vqa["n"] == 5
    assert vqa["question_prior"] == pytest.approx(2 / 5), "red on the first, no on the last"
    assert eager["metrics"]["accuracy"]["value"] == bundle["metrics"]["accuracy"]["value"] == 4 / 5
    assert eager["by_kind"]["colour"]["value"] == 1.0
    assert (eager["by_kind"]["yes/no"]["value"], eager["by_kind"]["yes/no"]["n"]) == (0.5, 2)
    assert "against_eager" not in eager
    assert bundle["against_eager"]["tokens"] == {"equal": 3, "n": 5}, "equally right, and yet not the same answers"
    assert bundle["against_eager"]["difference"]["accuracy"]["value"] == 0.0


def test_swapped_images_leave_only_what_needs_no_looking(tasks: Tasks, train: list[Row]) -> None:
    pipelines = compared(tasks, train)["vqa"]["pipelines"]
    for name in ("eager", "bundle"):
        assert pipelines[name]["swapped_images"]["value"] == 1 / 5, (
            "a colour is wrong now, one fixed yes or no is right"
        )


def test_captions(tasks: Tasks, train: list[Row]) -> None:
    caption = compared(tasks, train)["caption"]
    eager, bundle = caption["pipelines"]["eager"], caption["pipelines"]["bundle"]
    assert caption["question_prior"] is None
    assert list(eager["metrics"]) == ["exact_match"], "these rows tell no scene"
    assert (eager["metrics"]["exact_match"]["value"], bundle["metrics"]["exact_match"]["value"]) == (0.5, 0.0)
    assert bundle["against_eager"]["difference"]["exact_match"]["value"] == -0.5
    assert set(eager["corpus"]) == {"CIDEr", "BLEU-4", "ROUGE-L"}
    assert "swapped_images" not in eager


def test_scenes_bring_their_scorer_and_it_leads(tmp_path: Path) -> None:
    circle = {"shape": "circle", "colour": "red", "size": "small", "x": 0.5, "y": 0.5, "radius": 0.1}
    scene = {"objects": [circle], "cluttered": False}
    rows = [caption_row(colour_images(tmp_path)[0], "a small red circle in the middle", scene=scene)]
    arguments = {"batch_size": 2, "max_new_tokens": 8, "remark": "", "progress": QUIET}
    scored = answer_tasks([contestant("eager", Parrot())], {"caption": rows}, **arguments)
    assert list(scored["caption"]["eager"].scores) == ["attributes_right", "exact_match"]


def test_agreement_compares_every_token() -> None:
    def said(*token_ids: int) -> Answer:
        return Answer(None, None, "the same text", token_ids, {})

    ours = [said(1, 2), said(1, 2), said(1), said()]
    theirs = [said(1, 2), said(1, 3), said(1, 2), said()]
    assert agreement(ours, theirs) == {"equal": 2, "n": 4}


def test_one_token_limit_for_all() -> None:
    parrot = Parrot(instead={None: "a red circle"})
    capped = Capped(parrot, 2)
    answers = [capped.answer([Request("red.png")], max_new_tokens=asked)[0].text for asked in (None, 1, 5)]
    assert answers == ["a red", "a", "a red"]


def test_items_are_evenly_spaced_and_fit_the_task(tasks: Tasks) -> None:
    rows = [*tasks["caption"], *tasks["vqa"], question_row(Path("x.png"), "unanswered?")]
    assert fitting("vqa", rows, None) == list(tasks["vqa"])
    assert fitting("caption", rows, None) == list(tasks["caption"])
    assert fitting("vqa", rows, 2) == [tasks["vqa"][0], tasks["vqa"][2]]
    assert spread(tasks["vqa"], 99) == list(tasks["vqa"])


def test_items_are_all_that_is_held_of_a_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"image": f"{i}.png", "question": f"what {i}?", "answers": ["x"] * (i % 2)} for i in range(100)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    alive = Alive(monkeypatch)
    found = fitting("vqa", ManifestRows(tmp_path / "m.jsonl"), 5)
    assert [row.image.stem for row in found] == ["1", "21", "41", "61", "81"]
    assert alive.most <= 5 + 3, "those found, and what passes by"
    assert question_prior(ManifestRows(tmp_path / "m.jsonl"), found) == 1
    assert alive.most <= 5 + 3, "those found, and what passes by"


def test_every_answer_is_kept(tasks: Tasks) -> None:
    arguments = {"batch_size": 2, "max_new_tokens": 8, "remark": "", "progress": QUIET}
    scored = answer_tasks([contestant("eager", Parrot()), contestant("b", Parrot())], tasks, **arguments)
    lines = answer_lines("vqa", tasks["vqa"], scored["vqa"], {})
    assert len(lines) == 5
    assert lines[1]["answers"]["b"] == {"text": "green", "token_ids": [1], "scores": {"accuracy": 1.0}}
    assert (lines[1]["image_id"], lines[1]["references"], lines[1]["kind"]) == ("green", ["green"], "colour")
