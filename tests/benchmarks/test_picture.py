"""The pictures show the right items, answers and verdicts."""

from pathlib import Path

import pytest
from PIL import Image

from benchmarks import picture
from benchmarks.accuracy import answer_tasks
from benchmarks.figure import DPI, INK
from benchmarks.items import Scored, Task, Tasks
from benchmarks.picture import COLUMNS, RIGHT, WRONG, draw_answers
from runtime.progress import Progress
from tests.benchmarks.stand_ins import Parrot, caption_row, colour_images, contestant, question_row


@pytest.fixture
def tasks(tmp_path: Path) -> Tasks:
    red, green, blue, _ = colour_images(tmp_path)
    asked = [question_row(image, "what colour?", image.stem) for image in (red, red, green)]
    return {"vqa": asked, "caption": [caption_row(image, image.stem) for image in (blue, green, red)]}


@pytest.fixture
def scored(tasks: Tasks) -> dict[Task, dict[str, Scored]]:
    contestants = [contestant("eager", Parrot()), contestant("b", Parrot(instead={None: "a", "what colour?": "blue"}))]
    progress = Progress(quiet=True)
    return answer_tasks(contestants, tasks, batch_size=2, max_new_tokens=8, remark="", progress=progress)


def test_images_of_both_tasks_are_shown_once(tasks: Tasks) -> None:
    assert [row.image.stem for row in picture._shown(tasks, 6)] == ["red", "green"]
    assert len(picture._shown(tasks, 1)) == 1


def test_without_common_images_the_first_task_decides(tmp_path: Path) -> None:
    red, _, blue, _ = colour_images(tmp_path)
    tasks: Tasks = {"vqa": [question_row(red, "what?", "red")], "caption": [caption_row(blue, "blue")]}
    assert [row.image for row in picture._shown(tasks, 6)] == [red]


def test_a_card_tells_everything(tasks: Tasks, scored: dict[Task, dict[str, Scored]]) -> None:
    _, lines = picture._card(tasks["vqa"][2], tasks, scored)
    assert [line[:2] for line in lines] == [
        ("", "what colour?"), ("reference", "green"), ("eager", "✓ green"), ("b", "✗ blue"), ("", ""),
        ("", "Caption"), ("reference", "green"), ("eager", "✓ green"), ("b", "a"),
    ]  # fmt: skip
    colours = {label + text: colour for label, text, colour in lines}
    assert (colours["eager✓ green"], colours["b✗ blue"]) == (RIGHT, WRONG)
    assert colours["ba"] == INK, "a caption in other words than the reference is not thereby wrong"


def test_long_answers_are_wrapped() -> None:
    lines = picture._wrapped("eager", "word " * 40, INK)
    assert all(len(text) <= picture.WRAP for _, text, _ in lines)
    assert [label for label, _, _ in lines] == ["eager", *[""] * (len(lines) - 1)]
    assert " ".join(text for _, text, _ in lines).split() == ["word"] * 40


@pytest.mark.filterwarnings("error")
def test_odd_text_is_drawn_as_it_is(tmp_path: Path) -> None:
    """A formula that is none, letters the font lacks, and what cannot be printed."""
    rows = [question_row(colour_images(tmp_path)[0], "costs $1 or $x_{$?", "红\x00色")]
    scored = answer_tasks(
        [contestant("eager", Parrot())],
        {"vqa": rows},
        batch_size=1,
        max_new_tokens=8,
        remark="",
        progress=Progress(quiet=True),
    )
    draw_answers({"vqa": rows}, scored, 1, tmp_path / "answers.png")
    assert picture._wrapped("reference", "红\x00色", INK) == [("reference", "红 色", INK)]


def test_the_file_is_a_picture_with_the_images_in_it(
    tasks: Tasks, scored: dict[Task, dict[str, Scored]], tmp_path: Path
) -> None:
    draw_answers(tasks, scored, 6, tmp_path / "answers.png")
    with Image.open(tmp_path / "answers.png") as drawn:
        assert drawn.width == pytest.approx(COLUMNS * picture.CARD_WIDTH_IN * DPI, abs=2)
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(1 << 24)}
    assert {(255, 0, 0), (0, 128, 0)} <= colours, "the red and the green image"
    assert (0, 0, 255) not in colours, "the blue image has no question"


def test_latency_bars_leave_out_eager_where_only_the_cache_differs() -> None:
    phases_ms = {"preprocess": 1.0, "vision": 2.0, "qformer": 3.0, "prefill": 4.0, "decode": 5.0, "total": 15.0}
    eager = {"p50_ms": phases_ms, "time_over_eager": None}
    ours = {"p50_ms": phases_ms, "time_over_eager": {"value": 1.0}}
    cases = [
        {"task": "vqa", "batch": batch, "cache": cache, "pipelines": {"eager": eager, "b": ours}}
        for batch, cache in ((1, "off"), (8, "off"), (1, "hit"))
    ]
    bars = picture._bars({"latency": cases}, "vqa", 1)
    assert [label for label, _, _ in bars] == ["eager", "b", "b, cache hit"]
    assert bars[0][1:] == ({phase: ms for phase, ms in phases_ms.items() if phase != "total"}, 15.0)
