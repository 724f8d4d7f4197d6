"""Imported models are trained further by the command line, from the stage behind them, with the halves they brought."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import Blip2ForConditionalGeneration

from tests.trainer.convert.conftest import Case, pixels_for, qforge
from trainer.bridge import PARTS
from trainer.checkpoint import load_checkpoint, read_config

STEPS = {"steps": 2, "batch_size": 4, "warmup_steps": 1, "learning_rate": 1e-3, "eval_items": 2, "precision": "fp32"}
RECIPE = {
    "data": {
        "demo": {"train_scenes": 12, "val_scenes": 2, "test_scenes": 2, "questions_per_scene": 2, "image_size": 32}
    },
    "stage1": STEPS,
    "stage2": STEPS,
    "caption": STEPS,
    "vqa": STEPS,
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def test_a_stage_2_model_goes_on_and_learns_questions(
    case: Callable[[str], Case], recipe: Path, tmp_path: Path
) -> None:
    """Captions without a text branch; questions only after it was given one."""
    opt = case("opt")
    out = tmp_path / "captions"
    assert qforge("train", recipe, "--out", out, "--init", opt.checkpoint, "--stage", "stage2") == 0
    assert not (out / "steps/stage1").exists(), "an imported stage-2 model has stage 1 behind it"
    trained = read_config(out / "steps/stage2")
    assert trained.parts == ("language",)
    assert trained.frozen == read_config(opt.checkpoint).frozen
    after = load_checkpoint(out / "steps/stage2")
    assert not torch.equal(after.bridge.query_tokens, opt.ours.bridge.query_tokens)
    key = "encoder.layer.0.attention.attention.query.weight"
    moved = (after.bridge.qformer.state_dict()[key] - opt.ours.bridge.qformer.state_dict()[key]).abs().max()
    assert moved < 0.01, "two small steps from the imported weights, not from fresh ones"

    whole = tmp_path / "whole"
    assert qforge("import", opt.source, "--out", whole, "--text-from", case("retrieval").checkpoint) == 0
    assert qforge("train", recipe, "--out", tmp_path / "vqa", "--init", whole) == 0
    assert not (tmp_path / "vqa/steps/stage2").exists()
    answers = load_checkpoint(tmp_path / "vqa/checkpoint")
    assert answers.question_conditioned
    assert answers.bridge.parts == {"text", "contrast", "matching", "language"}


def test_what_is_missing_is_said_before_any_step(
    case: Callable[[str], Case], recipe: Path, tmp_path: Path, capsys
) -> None:
    assert qforge("train", recipe, "--out", tmp_path / "out", "--init", case("opt").checkpoint, "--stage", "vqa") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "lacks the part 'text' of its Q-Former" in said
    assert "--text-from STAGE1_CKPT" in said
    assert not (tmp_path / "out/checkpoint").exists()


def test_a_retrieval_model_gets_a_language_model(
    case: Callable[[str], Case], recipe: Path, tmp_path: Path, capsys
) -> None:
    retrieval, language = case("retrieval"), case("opt").checkpoint / "language"
    started = ("train", recipe, "--out", tmp_path / "out", "--init", retrieval.checkpoint, "--stage", "stage2")
    assert qforge(*started, "--set", f"model.language={language}") == 0
    assert "has no language part; it starts from random weights" in " ".join(capsys.readouterr().err.split())
    trained = load_checkpoint(tmp_path / "out/steps/stage2")
    assert trained.bridge.parts == set(PARTS) - {"generation", "temperature"}
    assert trained.language_model.config.model_type == "opt"
    words = trained.bridge.embeddings.word_embeddings.weight
    assert torch.equal(words, retrieval.ours.bridge.embeddings.word_embeddings.weight)


def test_other_halves_and_changed_sizes_are_refused(
    case: Callable[[str], Case], recipe: Path, tmp_path: Path, capsys
) -> None:
    opt = case("opt")
    for change, sentence in (
        (f"model.vision={case('llama').checkpoint / 'vision'}", "the bridge fits only the halves it was trained with"),
        ("model.qformer.queries=6", "query_tokens expected shape [1, 6, 24], found [1, 4, 24]"),
    ):
        out = tmp_path / change.partition("=")[0]
        assert (
            qforge("train", recipe, "--out", out, "--init", opt.checkpoint, "--stage", "stage2", "--set", change) == 2
        )
        assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_the_resolved_recipe_holds_the_model_of_the_checkpoint(
    case: Callable[[str], Case], recipe: Path, tmp_path: Path
) -> None:
    opt = case("opt")
    out = tmp_path / "out"
    prompt = "--set=model.caption_prompt=a photo of"
    assert qforge("train", recipe, "--out", out, "--init", opt.checkpoint, "--stage", "stage2", prompt) == 0
    written = yaml.safe_load((out / "recipe.yaml").read_text())["model"]
    assert written["caption_prompt"] == "a photo of"
    assert written["qformer"] == read_config(opt.checkpoint).model.qformer.model_dump(mode="json")
    assert written["vision"] == str(opt.checkpoint / "vision")
    again = json.loads((out / ".steps/stage2.json").read_text())
    assert qforge("train", recipe, "--out", out, "--init", opt.checkpoint, "--stage", "stage2", prompt) == 0
    assert json.loads((out / ".steps/stage2.json").read_text()) == again, "a second run does nothing"


def test_a_trained_image_encoder_goes_to_hugging_face_and_back(
    case: Callable[[str], Case], recipe: Path, pictures: list[Image.Image], tmp_path: Path
) -> None:
    """A caption fine-tune alone, by the command line, without any question in the data."""
    data, opt, out = tmp_path / "data", case("opt"), tmp_path / "run"
    assert qforge("data", "demo", "--out", data, "--set", "data.demo.train_scenes=12") == 0
    for manifest in data.glob("vqa_*.jsonl"):
        manifest.unlink()
    changes = ["stages=[caption]", f"data.root={data}", "caption.train_vision=true", "caption.learning_rate=0.01"]
    settings = [part for change in changes for part in ("--set", change)]
    assert qforge("train", recipe, "--out", out, "--init", opt.checkpoint, *settings) == 0
    with torch.no_grad():
        ours = load_checkpoint(out / "checkpoint")
        pixels = pixels_for(ours, pictures)
        assert not torch.allclose(ours.vision(pixels), opt.ours.vision(pixels), atol=1e-3)
        assert qforge("to-hf", out / "checkpoint", "--out", tmp_path / "hf") == 0
        theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
        expected = theirs.vision_model(pixel_values=pixels).last_hidden_state
        assert (ours.encode_image(pixels) - expected).abs().max() < 1e-5
        assert qforge("import", tmp_path / "hf", "--out", tmp_path / "back") == 0
        assert torch.equal(load_checkpoint(tmp_path / "back").encode_image(pixels), ours.encode_image(pixels))
