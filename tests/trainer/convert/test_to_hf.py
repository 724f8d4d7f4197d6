"""Checkpoints become folders that transformers loads as its own, and come back bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoProcessor,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    InstructBlipForConditionalGeneration,
)

from runtime.errors import CheckpointError
from tests.published import FAMILIES, RETRIEVAL, WITH_LANGUAGE
from tests.trainer.convert.conftest import pixels_for, qforge
from trainer.blip2 import new_blip2
from trainer.bridge import PARTS
from trainer.checkpoint import load_checkpoint, read_config, write_checkpoint
from trainer.config import ModelConfig
from trainer.convert import write_hf
from trainer.convert.stream import read_weights
from trainer.convert.to_hf import ARCHITECTURES, Kind

CLASSES = {
    "caption": Blip2ForConditionalGeneration,
    "retrieval": Blip2ForImageTextRetrieval,
    "instruct": InstructBlipForConditionalGeneration,
}


def loaded(folder: Path, kind: str):
    """transformers' model, which must miss nothing and find nothing it does not know."""
    model, info = CLASSES[kind].from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def same_checkpoint(one: Path, other: Path) -> None:
    """Every file that decides something is the same, tensors bit for bit."""
    for part in (".", "vision", "language"):
        if not (one / part).is_dir():
            assert not (other / part).exists()
            continue
        first, second = read_weights(one / part), read_weights(other / part)
        assert first.keys() == second.keys()
        for key, piece in first.items():
            assert piece.dtype == second[key].dtype, key
            assert torch.equal(piece.load(), second[key].load()), key
    for name in ("config.json", "metrics.json", "preprocessor.json", "recipe.yaml", "vision/config.json"):
        assert (one / name).read_text() == (other / name).read_text(), name
    for name in ("tokenizer", "text_tokenizer"):
        files = sorted(path.name for path in (one / name).glob("*"))
        assert files == sorted(path.name for path in (other / name).glob("*"))
        assert all((one / name / file).read_bytes() == (other / name / file).read_bytes() for file in files)


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_is_bit_for_bit(name: str, case, tmp_path) -> None:
    model = case(name)
    assert qforge("to-hf", model.checkpoint, "--out", tmp_path / "hf") == 0
    theirs = loaded(tmp_path / "hf", model.family.kind)
    for key, tensor in model.theirs.state_dict().items():
        found = theirs.state_dict()[key]
        assert torch.equal(found[: len(tensor)] if tensor.ndim else found, tensor), key
    assert qforge("import", tmp_path / "hf", "--out", tmp_path / "back") == 0
    same_checkpoint(model.checkpoint, tmp_path / "back")


@pytest.mark.parametrize("name", WITH_LANGUAGE)
@torch.no_grad()
def test_transformers_says_the_same_tokens(name: str, case, pictures: list[Image.Image], tmp_path) -> None:
    """Its processor and `generate`, against our prefix before the language model's own `generate`."""
    model = case(name)
    write_hf(model.checkpoint, tmp_path / "hf")
    theirs = loaded(tmp_path / "hf", model.family.kind)
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    assert type(processor.image_processor).__name__ == "BlipImageProcessorPil"
    prompt = "Question: what colour is the circle Answer:"
    inputs = processor(images=pictures, text=[prompt] * len(pictures), return_tensors="pt")
    ours = model.ours
    said = theirs.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=ours.pad_token_id)
    condition = (inputs["qformer_input_ids"], inputs["qformer_attention_mask"]) if "qformer_input_ids" in inputs else ()
    prefix = ours.query_prefix(ours.encode_image(pixels_for(ours, pictures)), *condition)
    ids = torch.tensor([ours.tokenizer(prompt).input_ids] * len(pictures))
    embeds = torch.cat([prefix, ours.language_model.get_input_embeddings()(ids)], dim=1)
    expected = ours.language_model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=list(ours.config.end_token_ids or ()),
        pad_token_id=ours.pad_token_id,
    )
    found = said if ours.language_model.config.is_encoder_decoder else said[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(found, expected)
    assert len({tuple(row) for row in found.tolist()}) > 1, "every image gets the same words"


@pytest.mark.parametrize("name", RETRIEVAL)
@torch.no_grad()
def test_retrieval_folder_scores_the_same(name: str, case, pictures: list[Image.Image], tmp_path) -> None:
    model = case(name)
    write_hf(model.checkpoint, tmp_path / "hf")
    theirs, processor = loaded(tmp_path / "hf", "retrieval"), AutoProcessor.from_pretrained(tmp_path / "hf")
    inputs = processor(images=pictures, text=["a red circle"] * len(pictures), return_tensors="pt")
    for matching in (True, False):
        found = theirs(**inputs, use_image_text_matching_head=matching).logits_per_image
        assert torch.equal(found, model.theirs(**inputs, use_image_text_matching_head=matching).logits_per_image)


@pytest.fixture(scope="session")
def everything(case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as our own training leaves it: every part, halves elsewhere, the question conditions it."""
    source = case("instruct-llama").checkpoint
    folder = tmp_path_factory.mktemp("trained") / "checkpoint"
    config = read_config(source).model.model_copy(update={"qformer_reads": "question", "image_norm_eps": 1e-5})
    torch.manual_seed(3)
    model = new_blip2(config, question_conditioned=True)
    folder.mkdir()
    write_checkpoint(model, folder, stage="vqa", metrics={"held_out": [{"step": 1}]}, recipe_yaml="seed: 3\n")
    return folder


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_a_layout_cannot_hold_lies_beside_it(kind: Kind, everything: Path, tmp_path, capsys) -> None:
    assert qforge("to-hf", everything, "--out", tmp_path / "hf", "--as", kind, "--json") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["architecture"] == ARCHITECTURES[kind]
    beside = load_file(tmp_path / "hf/qforge.safetensors")
    assert sorted(beside) == told["beside"]
    assert "bridge/temperature" in beside
    assert ("bridge/embeddings.word_embeddings.weight" in beside) == (kind == "caption")
    assert ("bridge/language_projection.weight" in beside) == (kind == "retrieval")
    loaded(tmp_path / "hf", kind)
    assert qforge("import", tmp_path / "hf", "--out", tmp_path / "back") == 0
    before, after = load_checkpoint(everything), load_checkpoint(tmp_path / "back")
    assert after.bridge.parts == frozenset(PARTS)
    for key, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[key]), key
    for name in ("metrics.json", "recipe.yaml", "preprocessor.json"):
        assert (everything / name).read_text() == (tmp_path / "back" / name).read_text()
    inside = {"vision": "./vision", "language": "./language", "text_tokenizer": "./text_tokenizer"}
    stored = json.loads((tmp_path / "back/config.json").read_text())["model"]
    assert stored == json.loads((everything / "config.json").read_text())["model"] | inside


@torch.no_grad()
def test_a_larger_image_size_is_written_into_the_folder(case, pictures: list[Image.Image], tmp_path) -> None:
    assert qforge("import", case("opt").source, "--out", tmp_path / "large", "--image-size", 24) == 0
    write_hf(tmp_path / "large", tmp_path / "hf")
    theirs, ours = loaded(tmp_path / "hf", "caption"), load_checkpoint(tmp_path / "large")
    assert theirs.config.vision_config.image_size == 24
    pixels = AutoProcessor.from_pretrained(tmp_path / "hf")(images=pictures, return_tensors="pt")["pixel_values"]
    expected = theirs.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    assert (ours.query_prefix(ours.encode_image(pixels)) - expected).abs().max() < 1e-5
    assert qforge("import", tmp_path / "hf", "--out", tmp_path / "back") == 0
    same_checkpoint(tmp_path / "large", tmp_path / "back")


def test_a_layout_that_does_not_fit_is_refused(case, everything: Path, model_config: ModelConfig, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"needs the parts language, this checkpoint lacks language"):
        write_hf(case("retrieval").checkpoint, tmp_path / "hf", "caption")
    with pytest.raises(CheckpointError, match=r"needs the parts text, contrast, matching, this checkpoint lacks text"):
        write_hf(case("opt").checkpoint, tmp_path / "hf", "retrieval")
    folder = tmp_path / "demo-like"
    folder.mkdir()
    write_checkpoint(new_blip2(model_config, False), folder, stage="stage2", metrics={}, recipe_yaml="{}\n")
    with pytest.raises(CheckpointError, match=r"BLIP-2's own ViT .* found clip_vision_model, layer -1"):
        write_hf(folder, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_folder_of_someone_else_is_not_replaced(case, tmp_path, capsys) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    assert qforge("to-hf", case("opt").checkpoint, "--out", tmp_path / "mine") == 2
    assert qforge("import", case("opt").source, "--out", tmp_path / "mine") == 2
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert all("not ours to replace" in line for line in capsys.readouterr().err.strip().splitlines())
