"""Language models of six shapes in training: what is read, what is predicted, and that only the bridge learns."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.dataset import Row
from runtime.errors import CheckpointError, InputError, MissingFile
from tests.families import FAMILIES, HABITS, new_tokenizer, write_family
from trainer.blip2 import Blip2, new_blip2
from trainer.config import ModelConfig
from trainer.generative import language_loss
from trainer.language import continuation, end_tokens, load_language, pad_token, require_prefix
from trainer.targets import Target, caption_target, question_target, split_target

ROW = Row(
    image=Path("a.png"),
    image_id="a",
    captions=("a small red circle above two large blue squares", "a circle"),
    question="What colour is it?",
    answers=("red",),
    extra={},
)
LONG = " ".join(f"red{i}" for i in range(60))


@pytest.fixture(scope="session")
def family_config(model_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory):
    """Family → model section, written once."""
    folder, written = tmp_path_factory.mktemp("families"), dict[str, ModelConfig]()

    def config(name: str) -> ModelConfig:
        if name not in written:
            written[name] = write_family(name, model_config, folder / name)
        return written[name]

    return config


@pytest.fixture(scope="session")
def family(family_config):
    """Family → question-conditioned model with a seeded bridge, without dropout; do not train it."""
    made = dict[str, Blip2]()

    def model(name: str) -> Blip2:
        if name not in made:
            torch.manual_seed(1)
            made[name] = new_blip2(family_config(name), question_conditioned=True).eval()
        return made[name]

    return model


def features(rows: int) -> torch.Tensor:
    return torch.randn(rows, 17, 32, generator=torch.Generator().manual_seed(0))


def targets_of(model: Blip2) -> list[Target]:
    """Unequal in everything: with and without prompt, question, a text beyond the limit."""
    rng = np.random.default_rng(0)
    return [
        question_target(model, ROW, rng),
        caption_target(model, ROW, rng),
        split_target(model, ROW, rng),
        Target("a picture of", LONG, None),
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_moves_the_bridge_alone_and_the_loss_falls(name: str, family_config) -> None:
    torch.manual_seed(1)
    model = new_blip2(family_config(name), question_conditioned=True).eval()
    before = {key: tensor.clone() for key, tensor in model.language_model.state_dict().items()}
    optimiser, losses = torch.optim.Adam(model.bridge.parameters(), lr=3e-3), []
    for _ in range(12):
        loss = language_loss(model, features(4), targets_of(model))
        optimiser.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        assert all(parameter.grad is None for parameter in model.language_model.parameters())
        moved = [p.grad for p in model.bridge.language_projection.parameters()] + [model.bridge.query_tokens.grad]
        assert all(gradient is not None and bool(gradient.isfinite().all() & gradient.any()) for gradient in moved)
        optimiser.step()
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.98 * losses[0]
    assert all(torch.equal(before[key], tensor) for key, tensor in model.language_model.state_dict().items())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_batch_weighs_its_rows_alike_whatever_their_padding(name: str, family) -> None:
    model, rows = family(name), features(4)
    targets = targets_of(model)
    alone = [language_loss(model, rows[i : i + 1], [target]) for i, target in enumerate(targets)]
    torch.testing.assert_close(language_loss(model, rows, targets), torch.stack(alone).mean(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("row", range(4))
@torch.no_grad()
def test_the_loss_is_transformers_own(name: str, row: int, family) -> None:
    """One row without any padding, labels by hand, loss by the language model's own forward."""
    model = family(name)
    target = targets_of(model)[row]
    texts = model.text_tokenizer([target.question or ""], return_tensors="pt")
    condition = (texts.input_ids, texts.attention_mask) if target.question else ()
    prefix = model.query_prefix(model.bridge.post_layernorm(features(1)), *condition)
    tokenizer, embed = model.tokenizer, model.language_model.get_input_embeddings()
    read = tokenizer(target.prompt).input_ids
    if model.style == "encoder-decoder":
        said = [*tokenizer(target.answer).input_ids[:-1][:31], 2]
        given = torch.cat([prefix, embed(torch.tensor([read]))], dim=1)
        expected = model.language_model(inputs_embeds=given, labels=torch.tensor([said])).loss
    else:
        spaced = target.answer if not target.prompt else f" {target.answer}"
        said = [*tokenizer(target.prompt + spaced).input_ids[len(read) :][:31], 2]
        given = torch.cat([prefix, embed(torch.tensor([read + said]))], dim=1)
        labels = torch.tensor([[-100] * (prefix.shape[1] + len(read)) + said])
        expected = model.language_model(inputs_embeds=given, labels=labels).loss
    torch.testing.assert_close(language_loss(model, features(1), [target]), expected, atol=2e-5, rtol=0)


def test_stage_2_of_an_encoder_decoder_splits_between_the_first_word_and_the_midpoint(family) -> None:
    model, rng = family("t5"), np.random.default_rng(0)
    long, short = ROW.captions[0].split(), ROW.captions[1].split()
    reads = Counter[int]()
    for _ in range(600):
        target = split_target(model, ROW, rng)
        read, said = target.prompt.split(), target.answer.split()
        assert read + said in (long, short)
        assert target.question is None
        if read + said == long:
            reads[len(read)] += 1
        else:
            assert (read, said) == (["a"], ["circle"])
    assert set(reads) == {1, 2, 3, 4}, "nine words, midpoint 4"
    assert min(reads.values()) > 0.6 * max(reads.values()), "drawn evenly"
    again = [split_target(model, ROW, np.random.default_rng(5)) for _ in range(2)]
    assert again[0] == again[1], "seeded"
    word = Row(image=Path("a.png"), image_id="a", captions=("circle",), question=None, answers=(), extra={})
    assert split_target(model, word, rng) == Target("", "circle", None)
    prompted = Blip2.__new__(Blip2)
    torch.nn.Module.__init__(prompted)
    prompted.config = model.config.model_copy(update={"caption_prompt": "a photo of"})
    assert split_target(prompted, word, rng) == Target("a photo of", "circle", None)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_answer_is_tokenised_as_it_follows_the_prompt(name: str) -> None:
    tokenizer = new_tokenizer(HABITS[name])
    read, said = continuation(tokenizer, "Question: what is it? Answer:", "red circle")
    assert tokenizer.decode(said).strip() == "red circle"
    assert read == tokenizer("Question: what is it? Answer:").input_ids
    if name in ("t5", "flan"):
        return  # an encoder-decoder's answer starts anew; its tokenizer closes the prompt with an end token
    assert tokenizer.decode(read + said, skip_special_tokens=True) == "Question: what is it? Answer: red circle"
    assert read + said == tokenizer("Question: what is it? Answer: red circle").input_ids
    assert continuation(tokenizer, "", "red")[0] == tokenizer("").input_ids


def test_pads_and_ends() -> None:
    llama, qwen2 = new_tokenizer(HABITS["llama"]), new_tokenizer(HABITS["qwen2"])
    assert (pad_token(llama, 2), pad_token(qwen2, 2)) == (2, 1)
    assert end_tokens(qwen2, None) == (2,)
    assert end_tokens(qwen2, (7, 2)) == (7, 2)
    qwen2.eos_token = None
    with pytest.raises(InputError, match=r"model.end_token_ids: the language model's tokenizer has no end token"):
        end_tokens(qwen2, None)


@torch.no_grad()
def test_the_configured_end_token_is_what_is_taught(family) -> None:
    model = family("opt")
    target = Target("a picture of", "red", None)
    usual = language_loss(model, features(1), [target])
    kept = model.config
    try:
        model.config = kept.model_copy(update={"end_token_ids": (9, 2)})
        assert model.end_token_ids == (9, 2)
        assert not torch.isclose(language_loss(model, features(1), [target]), usual)
    finally:
        model.config = kept


@torch.no_grad()
def test_the_whole_prompt_conditions_the_qformer_where_the_config_says_so(family_config) -> None:
    config = family_config("llama")
    torch.manual_seed(1)
    bare = new_blip2(config, question_conditioned=True).eval()
    whole = new_blip2(config.model_copy(update={"qformer_reads": "prompt"}), question_conditioned=True).eval()
    whole.bridge.load_state_dict(bare.bridge.state_dict())
    # Prompts that normalisation leaves as they are, so that the bare model can be given them as a question.
    asked, described = Target("is it red?", "yes", "red"), Target("a picture of", "red", None)
    for target in (asked, described):
        as_question = Target(target.prompt, target.answer, target.prompt)
        found = language_loss(whole, features(1), [target])
        torch.testing.assert_close(found, language_loss(bare, features(1), [as_question]))
        assert not torch.isclose(found, language_loss(bare, features(1), [target]), atol=1e-6)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_does_not_fit_is_refused(
    model_config: ModelConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_family("t5", model_config, tmp_path / "t5")
    change_config(tmp_path / "t5", decoder_start_token_id=None)
    generation = tmp_path / "t5" / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": 2}))
    with pytest.raises(CheckpointError, match="expected decoder_start_token_id"):
        load_language(str(tmp_path / "t5"))
    write_family("llama", model_config, tmp_path / "llama")
    change_config(tmp_path / "llama", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"has 9 weights its config does not know, the first is model\.layers\.1"):
        load_language(str(tmp_path / "llama"))
    change_config(tmp_path / "llama", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match="lacks 9 weights its config asks for"):
        load_language(str(tmp_path / "llama"))
    change_config(tmp_path / "llama", num_hidden_layers=2, intermediate_size=48)
    shapes = r"layers\.0\.mlp\.down_proj\.weight expected shape \[32, 48\] by config\.json, found \[32, 64\]"
    with pytest.raises(CheckpointError, match=shapes):
        load_language(str(tmp_path / "llama"))
    weights = tmp_path / "llama" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="a weight file is damaged"):
        load_language(str(tmp_path / "llama"))
    with pytest.raises(MissingFile, match="holds no model that transformers can read"):
        load_language(str(tmp_path / "nowhere"))
    assert capfd.readouterr().err == "", "one sentence, no table beside it"


def test_habits_of_generation_config_are_dropped(model_config: ModelConfig, tmp_path: Path) -> None:
    """A penalty that the bundle does not apply would make eager the wrong judge."""
    write_family("qwen2", model_config, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.05, "eos_token_id": 7}))
    loaded = load_language(str(tmp_path)).generation_config
    assert loaded.repetition_penalty in (None, 1.0)
    assert loaded.eos_token_id is None


def test_half_precision_weights_are_widened(model_config: ModelConfig, tmp_path: Path) -> None:
    write_family("llama", model_config, tmp_path)
    model = load_language(str(tmp_path))
    expected = {key: tensor.bfloat16().float() for key, tensor in model.state_dict().items()}
    model.bfloat16().save_pretrained(tmp_path)
    loaded = load_language(str(tmp_path))
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training


def test_a_language_model_without_inputs_embeds_is_refused() -> None:
    class Reader(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    with pytest.raises(InputError, match="Reader takes no `inputs_embeds`"):
        require_prefix(Reader())
