"""LAVIS files: a state dict under LAVIS' names gives the model that the Hugging Face folder of the same numbers gives.

The names are those of reference/training.md §2.2, written down here a second time, from our keys to theirs.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.published import FAMILIES as PUBLISHED
from tests.published import VISION, write_published
from tests.trainer.convert.conftest import Case, pixels_for, qforge
from trainer.blip2 import Blip2
from trainer.bridge import PARTS
from trainer.checkpoint import load_checkpoint, read_config
from trainer.convert.stream import read_weights

LAVIS_NAMES = {
    r"^vision_model\.embeddings\.class_embedding": "visual_encoder.cls_token",
    r"^vision_model\.embeddings\.position_embedding": "visual_encoder.pos_embed",
    r"^vision_model\.embeddings\.patch_embedding": "visual_encoder.patch_embed.proj",
    r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm": r"visual_encoder.blocks.\1.norm",
    r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv": r"visual_encoder.blocks.\1.attn.qkv",
    r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection": r"visual_encoder.blocks.\1.attn.proj",
    r"^vision_model\.encoder\.layers\.(\d+)\.mlp": r"visual_encoder.blocks.\1.mlp",
    r"^vision_model\.post_layernorm": "ln_vision",
    r"^qformer\.layernorm": "Qformer.bert.embeddings.LayerNorm",
    r"^embeddings\.(word|position)_embeddings": r"Qformer.bert.embeddings.\1_embeddings",
    r"^qformer\.encoder\.layer\.(\d+)\.(attention|crossattention)\.attention": r"Qformer.bert.encoder.layer.\1.\2.self",
    r"^qformer\.encoder": "Qformer.bert.encoder",
    r"^(vision|text)_projection": r"\1_proj",
    r"^language_projection": "opt_proj",
}
TOWER = "visual_encoder."
TOLERANCE = 1e-4
"""LAVIS' last image norm has epsilon 1e-5, transformers' 1e-6."""


def lavis_state(theirs: torch.nn.Module, *, tower: bool) -> dict[str, Tensor]:
    """A published model's numbers under LAVIS' names."""
    state: dict[str, Tensor] = {}
    for key, tensor in theirs.state_dict().items():
        if key.startswith("language_model."):
            continue
        name = key
        for pattern, lavis in LAVIS_NAMES.items():
            name, found = re.subn(pattern, lavis, key)
            if found:
                break
        if name.startswith(TOWER) and not tower:
            continue
        if name.endswith("attn.qkv.bias"):
            state[name.replace("qkv.bias", "q_bias")], _, state[name.replace("qkv.bias", "v_bias")] = tensor.chunk(3)
        else:
            state[name] = tensor.clone()
    return state


def generation_head(words: Tensor) -> dict[str, Tensor]:
    """What only LAVIS has: ITG head (tied decoder stored too) and temperature."""
    torch.manual_seed(5)
    rows, width = words.shape
    bias = torch.randn(rows)
    return {
        "temp": torch.tensor(0.05),
        "Qformer.cls.predictions.bias": bias,
        "Qformer.cls.predictions.transform.dense.weight": torch.randn(width, width),
        "Qformer.cls.predictions.transform.dense.bias": torch.randn(width),
        "Qformer.cls.predictions.transform.LayerNorm.weight": torch.randn(width),
        "Qformer.cls.predictions.transform.LayerNorm.bias": torch.randn(width),
        "Qformer.cls.predictions.decoder.weight": words,
        "Qformer.cls.predictions.decoder.bias": bias,
        "Qformer.bert.embeddings.position_ids": torch.arange(64)[None],
    }


def save(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"model": state, "config": {"run": {"task": "image_text_pretrain"}}, "epoch": 9}, path)
    return path


@pytest.fixture
def opt(case: Callable[[str], Case]) -> Case:
    """Stage 2; its frozen halves are those of the Hugging Face import."""
    return case("opt")


@pytest.fixture
def retrieval(case: Callable[[str], Case]) -> Case:
    return case("retrieval")


@pytest.fixture
def stage1_file(retrieval: Case, tmp_path: Path) -> Path:
    """All of stage 1, without the frozen tower."""
    state = lavis_state(retrieval.theirs, tower=False)
    state |= generation_head(state["Qformer.bert.embeddings.word_embeddings.weight"])
    return save(tmp_path / "stage1.pth", state)


def imported(path: Path, out: Path, *options: str | Path) -> Blip2:
    assert qforge("import", path, "--out", out, "--heads", 4, *options) == 0
    return load_checkpoint(out)


@torch.no_grad()
def same_prefix(one: Blip2, other: Blip2, pictures: list[Image.Image]) -> None:
    prefixes = [model.query_prefix(model.encode_image(pixels_for(model, pictures))) for model in (one, other)]
    assert (prefixes[0] - prefixes[1]).abs().max() < TOLERANCE


@pytest.mark.parametrize("zipped", [True, False], ids=["mapped", "old file"])
def test_stage_2(zipped: bool, opt: Case, pictures: list[Image.Image], tmp_path: Path) -> None:
    path = tmp_path / "stage2.pth"
    torch.save({"model": lavis_state(opt.theirs, tower=False)}, path, _use_new_zipfile_serialization=zipped)
    halves = ("--vision", opt.checkpoint / "vision", "--language", opt.checkpoint / "language")
    ours = imported(path, tmp_path / "checkpoint", *halves)
    config = read_config(tmp_path / "checkpoint")
    assert config.parts == ("language",)
    assert config.stage == "stage2"
    assert config.model.qformer == opt.ours.config.qformer.model_copy(
        update={"contrastive_width": 256, "text_positions": 512}
    )
    assert config.model.end_token_ids == opt.ours.config.end_token_ids, "LAVIS' OPT ends with a newline"
    assert config.model.image_norm_eps == 1e-5
    for key, tensor in opt.ours.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[key]), key
    same_prefix(ours, opt.ours, pictures)


def test_caption_fine_tune_brings_its_own_tower(opt: Case, pictures: list[Image.Image], tmp_path: Path) -> None:
    """Trained at 24 pixels; the folder's tower is for 16 and has other weights."""
    theirs = write_published(tmp_path / "hf", PUBLISHED["opt"], image_size=24)
    assert qforge("import", tmp_path / "hf", "--out", tmp_path / "hf-checkpoint") == 0
    by_hf = load_checkpoint(tmp_path / "hf-checkpoint")
    path = save(tmp_path / "caption.pth", lavis_state(theirs, tower=True))
    halves = ("--vision", opt.checkpoint / "vision", "--language", opt.checkpoint / "language")
    ours = imported(path, tmp_path / "checkpoint", *halves)
    assert ours.preprocess == by_hf.preprocess
    assert ours.preprocess.height == 24
    assert ours.config.caption_prompt == "a photo of"
    for key, tensor in by_hf.vision.state_dict().items():
        assert torch.equal(tensor, ours.vision.state_dict()[key]), key
    key_bias = ours.vision.state_dict()["model.encoder.layers.0.self_attn.qkv.bias"].chunk(3)[1]
    assert torch.equal(key_bias, torch.zeros(VISION["hidden_size"]))
    same_prefix(ours, by_hf, pictures)


@torch.no_grad()
def test_stage_1_has_every_part(
    retrieval: Case, stage1_file: Path, pictures: list[Image.Image], tmp_path: Path
) -> None:
    halves = ("--vision", retrieval.checkpoint / "vision", "--text-tokenizer", retrieval.checkpoint / "text_tokenizer")
    ours = imported(stage1_file, tmp_path / "checkpoint", *halves)
    assert ours.bridge.parts == set(PARTS) - {"language"}
    assert float(ours.bridge.temperature) == pytest.approx(0.05)
    state = torch.load(stage1_file, weights_only=True)["model"]
    assert torch.equal(ours.bridge.itg_head.bias, state["Qformer.cls.predictions.bias"])
    assert torch.equal(
        ours.bridge.itg_head.LayerNorm.weight, state["Qformer.cls.predictions.transform.LayerNorm.weight"]
    )
    coded = ours.text_tokenizer(["a red circle"] * len(pictures), return_tensors="pt")
    scores = []
    for model in (ours, retrieval.ours):
        keys = model.bridge.image_keys(model.encode_image(pixels_for(model, pictures)))
        scores.append(model.bridge.matching_logits(keys, coded["input_ids"], coded["attention_mask"]))
    assert (scores[0] - scores[1]).abs().max() < TOLERANCE


def test_retrieval_fine_tune_brings_its_own_tower(retrieval: Case, tmp_path: Path) -> None:
    path = save(tmp_path / "retrieval.pth", lavis_state(retrieval.theirs, tower=True))
    halves = ("--vision", retrieval.checkpoint / "vision", "--text-tokenizer", retrieval.checkpoint / "text_tokenizer")
    ours = imported(path, tmp_path / "checkpoint", *halves)
    for key, tensor in retrieval.ours.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[key]), key


def test_a_stage_2_model_gets_its_text_branch_back(
    opt: Case, retrieval: Case, stage1_file: Path, pictures: list[Image.Image], tmp_path: Path
) -> None:
    halves = ("--vision", retrieval.checkpoint / "vision", "--text-tokenizer", retrieval.checkpoint / "text_tokenizer")
    imported(stage1_file, tmp_path / "stage1", *halves)
    assert qforge("import", opt.source, "--out", tmp_path / "whole", "--text-from", tmp_path / "stage1") == 0
    whole, donor = load_checkpoint(tmp_path / "whole"), load_file(tmp_path / "stage1/model.safetensors")
    assert whole.bridge.parts == frozenset(PARTS)
    stored = load_file(tmp_path / "whole/model.safetensors")
    for key in (
        "temperature",
        "embeddings.word_embeddings.weight",
        "qformer.encoder.layer.1.intermediate.dense.weight",
    ):
        assert torch.equal(stored[key], donor[key])
    same_prefix(whole, opt.ours, pictures)
    from_hf = tmp_path / "from-hf"
    assert qforge("import", opt.source, "--out", from_hf, "--text-from", retrieval.checkpoint) == 0
    assert read_config(from_hf).parts == ("text", "contrast", "matching", "language")


def test_a_text_branch_that_does_not_fit_is_refused(opt: Case, retrieval: Case, tmp_path: Path, capsys) -> None:
    other = tmp_path / "other"
    for path in [retrieval.checkpoint, *sorted(retrieval.checkpoint.rglob("*"))]:
        target = other / path.relative_to(retrieval.checkpoint)
        target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
    config = json.loads((other / "config.json").read_text())
    config["model"]["qformer"]["layers"] = 5
    (other / "config.json").write_text(json.dumps(config))
    for donor, sentence in (
        (other, "expected a Q-Former with layers 3, found 5"),
        (opt.checkpoint, "expected a checkpoint with a text branch, found one without"),
    ):
        assert qforge("import", opt.source, "--out", tmp_path / "out", "--text-from", donor) == 2
        assert sentence in capsys.readouterr().err
    assert qforge("import", retrieval.source, "--out", tmp_path / "out", "--text-from", retrieval.checkpoint) == 2
    assert "has a text branch of its own" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bert_without_the_decoder_token_gets_it(retrieval: Case, stage1_file: Path, tmp_path: Path) -> None:
    """LAVIS' vocabulary is BERT's and one more; a user's BERT folder does not have it."""
    bert = tmp_path / "bert"
    retrieval.ours.text_tokenizer.save_pretrained(bert)
    config = json.loads((bert / "tokenizer_config.json").read_text())
    config.pop("bos_token")
    (bert / "tokenizer_config.json").write_text(json.dumps(config))
    state = torch.load(stage1_file, weights_only=True)["model"]
    words = state["Qformer.bert.embeddings.word_embeddings.weight"]
    grown = torch.cat([words, words[:1]])
    state |= generation_head(grown) | {"Qformer.bert.embeddings.word_embeddings.weight": grown}
    ours = imported(
        save(tmp_path / "grown.pth", state),
        tmp_path / "checkpoint",
        *("--vision", retrieval.checkpoint / "vision", "--text-tokenizer", bert),
    )
    assert ours.text_tokenizer.bos_token == "[DEC]"
    assert len(ours.text_tokenizer) <= len(grown)


def refused(capsys: pytest.CaptureFixture[str], path: Path, out: Path, *options: str | Path) -> str:
    capsys.readouterr()
    assert qforge("import", path, "--out", out, *options) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1, told.err
    assert not out.exists()
    return told.err


def test_what_does_not_fit_is_listed_and_refused(opt: Case, tmp_path: Path, capsys) -> None:
    good = lavis_state(opt.theirs, tower=False)
    halves = ("--vision", opt.checkpoint / "vision", "--language", opt.checkpoint / "language", "--heads", 4)
    out, path = tmp_path / "out", tmp_path / "file.pth"

    def told(change: dict[str, Tensor], *, without: str = "", options: tuple[str | Path, ...] = halves) -> str:
        state = {key: tensor for key, tensor in good.items() if not without or not key.startswith(without)}
        return refused(capsys, save(path, state | change), out, *options)

    assert "2 keys belong to no BLIP-2: mystery, visual_encoder.blocks.0.extra" in told(
        {"mystery": torch.ones(1), "visual_encoder.blocks.0.extra": torch.ones(1)}
    )
    gone = "Qformer.bert.encoder.layer.1.attention.self.query"
    assert "2 missing (qformer.encoder.layer.1.attention.attention.query.bias" in told({}, without=gone)
    assert "opt_proj" in told({}, without="opt_proj") or "--language was given" in told({}, without="opt_proj")
    wide = torch.ones(40, 24)
    assert "language_projection.weight expected shape [32, 24] by config.json, found [40, 24]" in told(
        {"opt_proj.weight": wide}
    )
    assert "give it: --vision DIR" in told({}, options=("--heads", 4))
    assert "give it: --language DIR" in told({}, options=("--vision", opt.checkpoint / "vision", "--heads", 4))
    assert "give --heads N" in told({}, options=halves[:-2])
    text = ("--text-tokenizer", opt.checkpoint / "tokenizer")
    assert "--text-tokenizer was given, but this file has nothing that uses it" in told({}, options=(*halves, *text))
    assert "expected a BLIP-2 with query_tokens of 3 axes, found no such key" in told({}, without="query_tokens")
    embedded = "Qformer.bert.encoder.layer.0.intermediate.dense.weight"
    assert "--text-tokenizer DIR" in told({embedded: torch.ones(40, 24)})
    text = ("--text-tokenizer", opt.checkpoint / "tokenizer")
    assert "embeddings.word_embeddings.weight of 2 axes, found no such key" in told(
        {embedded: torch.ones(40, 24)}, options=(*halves, *text)
    )
    half_bias = "visual_encoder.blocks.0.attn.q_bias"
    assert "q_bias and visual_encoder.blocks.0.attn.v_bias together" in told({half_bias: torch.ones(32)})
    torch.save(good, path)
    assert 'expected a LAVIS checkpoint (a "model" dictionary' in refused(capsys, path, out, *halves)


def test_weights_of_the_halves_are_read_from_the_folders(opt: Case, tmp_path: Path) -> None:
    path = save(tmp_path / "stage2.pth", lavis_state(opt.theirs, tower=False))
    imported(
        path, tmp_path / "checkpoint", "--vision", opt.checkpoint / "vision", "--language", opt.checkpoint / "language"
    )
    for half in ("vision", "language"):
        first, second = (read_weights(folder / half) for folder in (opt.checkpoint, tmp_path / "checkpoint"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key].load(), second[key].load()) for key in first)
