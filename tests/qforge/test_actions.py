"""What a run does with the user's own data before anything is trained, and what it says at the end."""

import json
from pathlib import Path

import pytest
from PIL import Image

from qforge.actions import failures_of, fingerprint_data, fingerprint_sources, prepare_data, sources_of, write_report
from qforge.recipe import Recipe, parse_recipe
from runtime.errors import DataError, ImageError, MissingFile
from runtime.files import write_json_atomic
from tests.benchmarks.stand_ins import write_log
from trainer.config import ModelConfig
from trainer.data import resolve

SETS = ("captions_train", "captions_test", "vqa_train", "vqa_test")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A recipe for two pictures of the user's own, trained and tested on."""
    root = tmp_path / "mine"
    root.mkdir()
    for i in range(2):
        Image.new("RGB", (4, 4), (100 * i, 0, 0)).save(root / f"{i}.png")
    for name in SETS:
        text = {"captions": ["a square"]} if name.startswith("captions") else {"question": "what?", "answers": ["it"]}
        rows = [json.dumps({"image": f"{i}.png", **text}) for i in range(2)]
        (root / f"{name}.jsonl").write_text("\n".join(rows))
    return parse_recipe("data: {captions_val: null, vqa_val: null}", [f"data.root={root}"], source="test")


@pytest.fixture
def root(recipe: Recipe) -> Path:
    assert recipe.data.root is not None
    return recipe.data.root


def test_manifest_paths_are_those_of_the_trainer(recipe: Recipe, tmp_path: Path) -> None:
    for some in (recipe, Recipe()):
        resolved = resolve(some.data, tmp_path / "data")
        for setting, sources in sources_of(some, tmp_path).items():
            assert getattr(resolved, setting) == sources


def test_sound_data_are_counted(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_data(recipe, tmp_path, tmp_path)
    found = json.loads((tmp_path / "check.json").read_text())["manifests"]
    assert set(found) == set(SETS)
    assert all(report["images"] == 2 and report["ok"] for reports in found.values() for report in reports)
    assert capsys.readouterr().err == ""


def test_a_broken_training_image_is_a_warning(
    recipe: Recipe, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "captions_train.jsonl").write_text('{"image": "gone.png", "captions": ["a square"]}')
    prepare_data(recipe, tmp_path, tmp_path)
    said = capsys.readouterr().err
    assert "warning" in said
    assert "gone.png" in said


def test_a_broken_test_image_stops_the_run(recipe: Recipe, root: Path, tmp_path: Path) -> None:
    (root / "vqa_test.jsonl").write_text('{"image": "gone.png", "question": "what?", "answers": ["it"]}')
    with pytest.raises((ImageError, MissingFile), match=r"gone\.png"):
        prepare_data(recipe, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [("", DataError, "empty data set"), ("{", DataError, "vqa_train.jsonl:1"), (None, MissingFile, "vqa_train.jsonl")],
)
def test_a_wrong_manifest_stops_the_run(
    recipe: Recipe, root: Path, tmp_path: Path, content: str | None, error: type[Exception], said: str
) -> None:
    manifest = root / "vqa_train.jsonl"
    if content is None:
        manifest.unlink()
    else:
        manifest.write_text(content)
    with pytest.raises(error, match=said):
        fingerprint_data(recipe, tmp_path)


def test_the_fingerprint_knows_manifests_and_images(recipe: Recipe, root: Path, tmp_path: Path) -> None:
    before = fingerprint_data(recipe, tmp_path)
    assert before == fingerprint_data(recipe, tmp_path)
    Image.new("RGB", (9, 9)).save(root / "1.png")
    image_changed = fingerprint_data(recipe, tmp_path)
    assert image_changed != before
    with (root / "vqa_test.jsonl").open("a") as file:
        file.write('\n{"image": "0.png", "question": "why?", "answers": ["so"]}')
    assert fingerprint_data(recipe, tmp_path) != image_changed


def test_halves_in_a_local_folder_count_as_inputs(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text("{}")
    assert fingerprint_sources(ModelConfig()) == {}
    before = fingerprint_sources(ModelConfig(vision=str(tmp_path / "clip"), language="hub/id"))
    (tmp_path / "clip" / "config.json").write_text('{"a": 1}')
    assert before != fingerprint_sources(ModelConfig(vision=str(tmp_path / "clip"), language="hub/id"))


def test_the_report_has_the_measurement_and_the_way_on(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "steps/bench/result.json", {"failures": ["int8: vqa: lost too much"]})
    (tmp_path / "steps/bench/report.md").write_text("## Measured\n\nfast\n")
    (tmp_path / "steps/bench/answers.png").write_bytes(b"png")
    write_json_atomic(tmp_path / ".steps/stage1.json", {"inputs": {}, "outputs": {}, "seconds": 12.34})
    (tmp_path / "report").mkdir()
    stage = write_log(tmp_path / "checkpoint", "stage1", {}, lambda step: {"loss": 1.0 / step})
    alarm = {"kind": "loss_rising", "step": 40, "text": "the loss rose: lower learning_rate"}
    write_json_atomic(stage / "metrics.json", {"stage": "stage1", "alarms": [alarm]})

    write_report([tmp_path / "bundle-int8"], [stage], tmp_path, tmp_path / "report")

    text = (tmp_path / "report/report.md").read_text()
    assert "## Measured" in text
    assert f"qforge vqa {tmp_path}/bundle-int8" in text
    assert "| stage1 | 12.3 |" in text
    assert (tmp_path / "report/answers.png").read_bytes() == b"png"
    assert "(training.png)" in text
    assert "- stage1, step 40: the loss rose: lower learning_rate." in text
    with Image.open(tmp_path / "report/training.png") as picture:
        assert picture.format == "PNG"
    assert failures_of(tmp_path) == ["int8: vqa: lost too much"]
