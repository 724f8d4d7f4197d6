"""data features and data filter as their user meets them: on tiny halves, a tiny bundle and a tiny checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from runtime.dataset import read_manifest
from runtime.dataset_check import check_manifest
from runtime.files import atomic_folder
from runtime.progress import Progress
from tests.qforge.test_verbs import call
from tests.runtime.both_heads import write_bundle_with_both_heads
from tests.runtime.conftest import write_tiny_bundle
from tests.runtime.retrieval_bundle import write_retrieval_bundle
from tests.tiny import write_tiny_halves
from trainer.blip2 import new_blip2
from trainer.checkpoint import write_checkpoint
from trainer.config import ModelConfig
from trainer.data_config import DemoWorldConfig
from trainer.demo_world import write_demo_world
from trainer.towers import VisionTower

WORLD = DemoWorldConfig(train_scenes=10, val_scenes=4, test_scenes=4, questions_per_scene=2, image_size=32)
STAGE = "{steps: 2, batch_size: 4, warmup_steps: 1, eval_items: 4, precision: fp32}"


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return write_tiny_halves(tmp_path_factory.mktemp("halves"))


@pytest.fixture
def recipe(tmp_path: Path, halves: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of stage 1 on a small world of its own, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    write_demo_world(WORLD, tmp_path / "world", Progress(quiet=True))
    path = tmp_path / "recipe.yaml"
    model = json.dumps(halves.model_dump(mode="json"))
    path.write_text(f"model: {model}\ndata: {{root: world}}\nstage1: {STAGE}\n")
    return path


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images that passed a tower, call by call."""
    calls, forward = list[int](), VisionTower.forward

    def counting(self: VisionTower, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels_BCHW))
        return forward(self, pixels_BCHW)

    monkeypatch.setattr(VisionTower, "forward", counting)
    return calls


def found(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


def test_features_are_made_once_and_trained_on(
    recipe: Path, passed: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ("--set", "data.features.folder=features")
    Path("world/images/train-00002.png").write_bytes(b"not a picture")
    code, out, err = call(capsys, "data", "features", recipe, *cache, "--json")
    facts = found(out)
    assert code == 0, err
    assert sum(passed) == facts["stored"] == facts["misses"] == 13
    assert [Path(path).name for path in facts["broken"]] == ["train-00002.png"]
    del passed[:]
    code, out, _ = call(capsys, "data", "features", recipe, *cache)
    assert (code, passed) == (0, [])
    assert "0 stored, 0 found no room" in out
    assert "1 images cannot be read and are left out:" in out
    code, _, err = call(capsys, "train", recipe, "--out", "run", "--stage", "stage1", *cache)
    assert (code, passed) == (0, []), err
    metrics = json.loads(Path("run/steps/stage1/metrics.json").read_text())
    assert metrics["features"]["misses"] == metrics["features"]["stored"] == 0
    assert metrics["features"]["hits"] >= 8
    assert metrics["features"]["bytes"] == facts["bytes"]
    assert "stage1: image features hits" in err


def test_what_cannot_be_cached_is_said_before_anything_is_done(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ("--set", "data.features.folder=features")
    for arguments, sentence in (
        ([], "data.features.folder: expected a folder to keep image features in, found null"),
        ([*cache, "--set", "data.root=null"], "data.root: expected a folder of data sets, found null"),
        ([*cache, "--set", "data.augment.flip=true"], "data: features.folder keeps what the image encoder makes"),
        ([*cache, "--set", "stage1.train_vision=true"], "stage1.train_vision: data.features.folder keeps features"),
        ([*cache, "--set", "stage2.shard=[vision]"], "stage2.shard: an image encoder that is shared out among"),
    ):
        code, out, err = call(capsys, "data", "features", recipe, *arguments)
        assert (code, out) == (2, "")
        assert sentence in err
    assert not Path("features").exists()


@pytest.fixture
def noisy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Captions that name another colour, and one that does not; in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    for name, colour in {"red": (200, 0, 0), "green": (0, 150, 0)}.items():
        Image.new("RGB", (9, 7), colour).save(tmp_path / f"{name}.png")
    rows = [
        {"image": "red.png", "captions": ["photo of blue", "green"]},
        {"image": "green.png", "captions": ["a green photo", "blue"]},
        {"image": "missing.png", "captions": ["red"]},
    ]
    path = tmp_path / "noisy.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_bundle_filters_captions(noisy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bundle_with_both_heads(Path("bundle"))
    few = ("--captions", "3", "--seed", "4")
    code, out, err = call(capsys, "data", "filter", "bundle", "--data", noisy, "--out", "clean.jsonl", *few, "--json")
    assert code == 0, err
    facts = found(out)
    assert (facts["images"], facts["kept"]) == (2, {"original": 2, "synthetic": 2})
    assert facts["mean_similarity"]["before"] == pytest.approx(0.25, abs=1e-3)
    assert facts["mean_similarity"]["after"] == pytest.approx(0.75, abs=1e-3)
    assert [Path(path).name for path in facts["broken"]] == ["missing.png"]
    assert [row.captions[0] for row in read_manifest(Path("clean.jsonl"))] == ["a red", "a green photo"]
    code, out, _ = call(capsys, "data", "filter", "bundle", "--data", noisy, "--out", "again.jsonl", *few)
    assert (code, Path("again.jsonl").read_bytes()) == (0, Path("clean.jsonl").read_bytes())
    assert "kept 2 of 4 original captions and 2 of 3 made ones" in out
    assert "mean similarity of image and caption: 0.250 before, 0.750 after" in out
    assert "1 images cannot be read and are left out:" in out


def test_describer_and_scorer_may_be_two(noisy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_bundle(Path("speaks"))
    write_retrieval_bundle(Path("searches"))
    arguments = ("data", "filter", "speaks", "--data", noisy, "--out", "clean.jsonl", "--keep", "1")
    code, _, err = call(capsys, *arguments)
    assert (code, "speaks: this bundle answers and cannot search" in err) == (2, True)
    code, _, err = call(capsys, *arguments, "--scorer", "searches")
    assert code == 0, err
    assert [row.captions for row in read_manifest(Path("clean.jsonl"))] == [("a red",), ("a green photo",)]


def test_a_checkpoint_filters_captions_and_the_result_trains(
    recipe: Path, halves: ModelConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights are random, so what it keeps means nothing; that it keeps, repeats itself and trains does."""
    torch.manual_seed(0)
    with atomic_folder("checkpoint") as folder:
        write_checkpoint(new_blip2(halves, False), folder, stage="stage2", metrics={}, recipe_yaml="{}\n")
    few = ("--captions", "3", "--max-new-tokens", "5", "--batch-size", "4")
    source, texts = "world/captions_train.jsonl", list[bytes]()
    for seed in ("1", "1", "2"):
        out = f"world/filtered-{len(texts)}.jsonl"
        code, said, err = call(
            capsys, "data", "filter", "checkpoint", "--data", source, "--out", out, *few, "--seed", seed, "--json"
        )
        assert code == 0, err
        texts.append(Path(out).read_bytes())
    assert texts[0] == texts[1] != texts[2]
    facts, rows = found(said), read_manifest(Path(out))
    assert facts["images"] == len(rows) == 10
    assert facts["kept"]["synthetic"] > 0
    assert all(len(row.captions) == len(row.extra["caption_scores"]) == 2 for row in rows)
    assert all(a["score"] >= b["score"] for a, b in (row.extra["caption_scores"] for row in rows))
    assert check_manifest(Path(out)).ok
    chosen = ("--set", f"data.captions_train={Path(out).name}", "--set", "stage1.steps=1")
    code, _, err = call(capsys, "train", recipe, "--out", "run", "--stage", "stage1", *chosen)
    assert code == 0, err


def test_wrong_use_is_one_sentence(noisy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bundle_with_both_heads(Path("bundle"))
    Path("there.jsonl").write_text("mine\n")
    for change, sentence in (
        (["--captions", "0"], "captions: expected at least 1, found 0"),
        (["--keep", "0"], "keep: expected at least 1, found 0"),
        (["--top-p", "0"], "top_p: expected a number above 0"),
        (["--batch-size", "0"], "--batch-size: expected at least 1, found 0"),
        (["--out", "there.jsonl"], "there.jsonl is there already"),
        (["--scorer", "nowhere"], "nowhere: expected a bundle or a checkpoint folder, found nothing there"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: expected"),
    ):
        options = {"--data": str(noisy), "--out": "clean.jsonl", change[0]: change[1]}
        code, out, err = call(capsys, "data", "filter", "bundle", *(word for pair in options.items() for word in pair))
        assert (code, out) == (2, ""), err
        assert sentence in err
    assert Path("there.jsonl").read_text() == "mine\n"
