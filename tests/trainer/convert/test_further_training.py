"""Imported models are trained further by the command line, from the stage behind them, with the halves they brought."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from tests.trainer.convert.conftest import Case, qforge
from trainer.bridge import PARTS
from trainer.checkpoint import load_checkpoint, read_config

STEPS = {"steps": 2, "batch_size": 4, "warmup_steps": 1, "learning_rate": 1e-3, "eval_items": 2, "precision": "fp32"}
RECIPE = {
    "data": {
        "demo": {"train_scenes": 12, "val_scenes": 2, "test_scenes": 2, "questions_per_scene": 2, "image_size": 32}
    },
    "stage1": STEPS,
    "stage2": STEPS,
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
