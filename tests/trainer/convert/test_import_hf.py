"""Published folders, imported by the command line, give what transformers' own classes give for them."""

import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from runtime.text import fill_prompt
from tests.published import FAMILIES, QUERIES, RETRIEVAL, WITH_LANGUAGE, edit_json, write_published
from tests.trainer.convert.conftest import Case, pixels_for, qforge
from trainer.blip2 import Blip2, TextBatch
from trainer.checkpoint import load_checkpoint, read_config

QUESTIONS = ["what colour is the circle ?", "how many", "is there a red square left of the large blue triangle ?"]
CAPTIONS = ["a red circle", "a small green square above a large blue triangle", "two shapes"]
PREFIX_TOLERANCE, LOGIT_TOLERANCE, SCORE_TOLERANCE = 1e-5, 1e-4, 1e-5


def prompts_of(model: Blip2, count: int) -> list[str]:
    """Filled prompts of different lengths, captions among them."""
    questions = [fill_prompt(model.config.vqa_prompt, QUESTIONS[n % len(QUESTIONS)]) for n in range(count)]
    return [model.config.caption_prompt if n % 4 == 3 else question for n, question in enumerate(questions)]


def text_condition(case: Case, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """What InstructBLIP's processor gives the Q-Former: the whole prompt."""
    if case.family.kind != "instruct":
        return None, None
    coded = case.ours.text_tokenizer(prompts, padding=True, return_tensors="pt")
    return coded["input_ids"], coded["attention_mask"]


@torch.no_grad()
def their_logits(case: Case, pixels: torch.Tensor, prompt: str, continuation: torch.Tensor) -> torch.Tensor:
    """Logits of transformers' model, one request at a time: `<image>` tokens, prompt, then `continuation`."""
    theirs, config = case.theirs, case.theirs.config
    ids = torch.tensor([[config.image_token_index] * QUERIES + case.ours.tokenizer(prompt).input_ids])
    inputs = {"pixel_values": pixels}
    if case.family.kind == "instruct":
        coded = case.ours.text_tokenizer([prompt], return_tensors="pt")
        inputs |= {"qformer_input_ids": coded["input_ids"], "qformer_attention_mask": coded["attention_mask"]}
    if config.text_config.is_encoder_decoder:
        return theirs(**inputs, input_ids=ids, decoder_input_ids=continuation).logits
    return theirs(**inputs, input_ids=torch.cat([ids, continuation], dim=1)).logits[:, -continuation.shape[1] :]


@torch.no_grad()
def our_logits(case: Case, prefix: torch.Tensor, prompt: str, continuation: torch.Tensor) -> torch.Tensor:
    """The same through our bridge's prefix and the imported language model."""
    language = case.ours.language_model
    embed = language.get_input_embeddings()
    embeds = torch.cat([prefix, embed(torch.tensor([case.ours.tokenizer(prompt).input_ids]))], dim=1)
    if language.config.is_encoder_decoder:
        return language(inputs_embeds=embeds, decoder_input_ids=continuation).logits
    return language(inputs_embeds=torch.cat([embeds, embed(continuation)], dim=1)).logits[:, -continuation.shape[1] :]


@pytest.mark.parametrize("name", [name for name in WITH_LANGUAGE if FAMILIES[name].image_token_has_row])
@torch.no_grad()
def test_logits_equal_transformers(name: str, case, pictures: list[Image.Image]) -> None:
    model = case(name)
    pixels = pixels_for(model.ours, pictures)
    prompts = prompts_of(model.ours, len(pictures))
    prefix = model.ours.query_prefix(model.ours.encode_image(pixels), *text_condition(model, prompts))
    continuation = torch.tensor([[5, 40, 41, 42]])
    distance, spread = 0.0, []
    for n, prompt in enumerate(prompts):
        theirs = their_logits(model, pixels[n : n + 1], prompt, continuation)
        distance = max(
            distance, float((our_logits(model, prefix[n : n + 1], prompt, continuation) - theirs).abs().max())
        )
        spread.append(theirs)
    assert distance < LOGIT_TOLERANCE
    assert torch.cat(spread).std(dim=0).max() > 10 * LOGIT_TOLERANCE, "the images or prompts change nothing"


@pytest.mark.parametrize("name", WITH_LANGUAGE)
@torch.no_grad()
def test_prefix_equals_transformers_in_a_batch_and_alone(name: str, case, pictures: list[Image.Image]) -> None:
    model = case(name)
    pixels = pixels_for(model.ours, pictures)
    prompts = prompts_of(model.ours, len(pictures))
    ids, mask = text_condition(model, prompts)
    found = model.ours.query_prefix(model.ours.encode_image(pixels), ids, mask)
    given = {} if ids is None else {"qformer_input_ids": ids, "qformer_attention_mask": mask}
    expected = model.theirs.get_image_features(pixel_values=pixels, **given, return_dict=True).pooler_output
    assert (found - expected).abs().max() < PREFIX_TOLERANCE
    alone = text_condition(model, prompts[:1])
    first = model.ours.query_prefix(model.ours.encode_image(pixels[:1]), *alone)
    assert (found[:1] - first).abs().max() < PREFIX_TOLERANCE
    assert found.std(dim=0).max() > 0.01


@pytest.mark.parametrize("name", RETRIEVAL)
@torch.no_grad()
def test_retrieval_scores_equal_transformers(name: str, case, pictures: list[Image.Image]) -> None:
    model = case(name)
    bridge, processor = model.ours.bridge, AutoProcessor.from_pretrained(model.source)
    pixels = pixels_for(model.ours, pictures)
    embeds = model.ours.encode_image(pixels)
    keys = bridge.image_keys(embeds)
    for caption in CAPTIONS:
        theirs = processor(images=pictures, text=[caption] * len(pictures), return_tensors="pt")
        assert (theirs["pixel_values"] - pixels).abs().max() < 1e-6
        coded = model.ours.text_tokenizer([caption] * len(pictures), return_tensors="pt")
        texts = TextBatch(coded["input_ids"], coded["attention_mask"])
        assert torch.equal(texts.ids, theirs["input_ids"])
        matched = model.theirs(**theirs, use_image_text_matching_head=True).logits_per_image
        assert (bridge.matching_logits(keys, texts.ids, texts.mask) - matched).abs().max() < SCORE_TOLERANCE
        contrast = model.theirs(**theirs).logits_per_image[:, 0]
        cosines = torch.einsum(
            "bqc,c->bq", bridge.image_features(keys, len(pictures)), bridge.text_features(texts.ids, texts.mask)[0]
        )
        assert (cosines.max(dim=1).values - contrast).abs().max() < SCORE_TOLERANCE
        assert contrast.std() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_numerics_and_conventions_of_the_source_are_kept(name: str, case) -> None:
    model = case(name)
    config, theirs = read_config(model.checkpoint), model.theirs.config
    ours = config.model
    assert ours.image_norm_eps == theirs.vision_config.layer_norm_eps
    assert ours.qformer.layer_norm_eps == theirs.qformer_config.layer_norm_eps
    assert ours.qformer.queries == theirs.num_query_tokens
    assert ours.qformer_reads == ("prompt" if model.family.kind == "instruct" else "question")
    assert config.question_conditioned == (model.family.kind == "instruct")
    if model.family.kind == "retrieval":
        assert ours.language is None
        return
    assert ours.end_token_ids == (theirs.text_config.eos_token_id,)
    assert type(model.ours.language_model) is type(model.theirs.language_model)
    own = model.ours.language_model.config.to_dict()
    for key, value in theirs.text_config.to_dict().items():
        if key not in ("transformers_version", "architectures", "dtype", "_name_or_path"):
            assert own[key] == value, key
    assert (ours.text_tokenizer is None) == (model.family.kind == "caption")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_is_whole_and_can_be_moved(name: str, case, tmp_path) -> None:
    model = case(name)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in sorted(model.checkpoint.rglob("*")):
        target = moved / path.relative_to(model.checkpoint)
        target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
    again = load_checkpoint(moved)
    assert str(tmp_path) in again.config.vision
    assert torch.equal(again.bridge.query_tokens, model.ours.bridge.query_tokens)
    assert (moved / "recipe.yaml").is_file()
    assert json.loads((moved / "metrics.json").read_text())["imported"]["architecture"]


def test_a_token_without_a_row_is_left_out(case) -> None:
    model = case("opt-no-image-token")
    assert "<image>" not in model.ours.tokenizer.get_vocab()
    assert "<image>" in case("opt").ours.tokenizer.get_vocab()
    assert "<image>" not in case("retrieval").ours.text_tokenizer.get_vocab()


@pytest.mark.parametrize("largest", [None, "40KB"])
def test_pytorch_files_give_the_same_checkpoint(largest: str | None, case, tmp_path) -> None:
    model = case("opt")
    source = tmp_path / "binary"
    source.mkdir()
    for path in model.source.iterdir():
        if path.suffix != ".safetensors":
            (source / path.name).write_bytes(path.read_bytes())
    state = model.theirs.state_dict()  # tied weights under both names, as such files have them
    if largest is None:
        torch.save(state, source / "pytorch_model.bin")
    else:
        keys = sorted(state)
        halves = {"pytorch_model-00001-of-00002.bin": keys[::2], "pytorch_model-00002-of-00002.bin": keys[1::2]}
        for name, part in halves.items():
            torch.save({key: state[key] for key in part}, source / name)
        places = {key: name for name, part in halves.items() for key in part}
        index = {"metadata": {}, "weight_map": places}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert qforge("import", source, "--out", tmp_path / "checkpoint") == 0
    ours = load_checkpoint(tmp_path / "checkpoint")
    for key, tensor in model.ours.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[key]), key


@torch.no_grad()
def test_half_precision_is_kept_on_disk(tmp_path, pictures: list[Image.Image]) -> None:
    theirs = write_published(tmp_path / "source", FAMILIES["opt"])
    theirs.half().save_pretrained(tmp_path / "source")
    assert qforge("import", tmp_path / "source", "--out", tmp_path / "checkpoint") == 0
    from trainer.convert.stream import read_weights

    assert {piece.dtype for piece in read_weights(tmp_path / "checkpoint/language").values()} == {"F16"}
    ours = load_checkpoint(tmp_path / "checkpoint")
    pixels = pixels_for(ours, pictures[:4])
    expected = theirs.float().get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    assert (ours.query_prefix(ours.encode_image(pixels)) - expected).abs().max() < PREFIX_TOLERANCE


@torch.no_grad()
def test_larger_images_interpolate_as_transformers_does(case, pictures: list[Image.Image], tmp_path) -> None:
    model = case("opt")
    assert qforge("import", model.source, "--out", tmp_path / "large", "--image-size", 24) == 0
    ours = load_checkpoint(tmp_path / "large")
    pixels = pixels_for(ours, pictures)
    assert pixels.shape[-2:] == (24, 24)
    expected = model.theirs.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True, return_dict=True)
    found = ours.query_prefix(ours.encode_image(pixels))
    assert (found - expected.pooler_output).abs().max() < PREFIX_TOLERANCE


def test_decoding_that_is_not_greedy_is_said(case, tmp_path, capsys) -> None:
    source = tmp_path / "source"
    shutil.copytree(case("opt").source, source)
    edit_json(source / "generation_config.json", lambda tree: tree.update(num_beams=5, repetition_penalty=1.5))
    assert qforge("import", source, "--out", tmp_path / "checkpoint") == 0
    assert "asks for num_beams 5, repetition_penalty 1.5; text is decoded greedily" in capsys.readouterr().err
    recorded = json.loads((tmp_path / "checkpoint/metrics.json").read_text())["imported"]["generation_config"]
    assert recorded["num_beams"] == 5
