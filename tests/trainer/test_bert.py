"""A Q-Former that starts from BERT reads text as BERT does; the oracle is transformers' own model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast, PreTrainedTokenizerFast

from runtime.errors import CheckpointError, InputError
from tests.tiny import widen
from tests.trainer.test_train import run
from trainer.bert import start_from_bert
from trainer.blip2 import Blip2, new_blip2
from trainer.checkpoint import load_checkpoint
from trainer.config import ModelConfig
from trainer.data import ResolvedData
from trainer.towers import DECODER_TOKEN


@pytest.fixture(scope="module")
def bert_folder(model_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT and its tokenizer, which has no `[DEC]`."""
    folder = tmp_path_factory.mktemp("bert")
    words = PreTrainedTokenizerFast.from_pretrained(str(model_config.text_tokenizer)).get_vocab()
    named = [word for word in sorted(words, key=lambda word: words[word]) if word != DECODER_TOKEN]
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(named)})
    assert tokenizer.bos_token is None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
    )
    model = BertForMaskedLM(config)
    widen(model)
    model.save_pretrained(folder)
    return folder


def made(model_config: ModelConfig, folder: Path, **changes: Any) -> Blip2:
    qformer = model_config.qformer.model_copy(update=changes)
    config = model_config.model_copy(update={"text_tokenizer": str(folder), "qformer": qformer})
    torch.manual_seed(2)
    return new_blip2(config, question_conditioned=True).eval()


@torch.no_grad()
def test_text_is_read_and_said_as_bert_does(model_config: ModelConfig, bert_folder: Path) -> None:
    model = made(model_config, bert_folder, layers=3)
    start_from_bert(model, str(bert_folder))
    theirs: Any = BertForMaskedLM.from_pretrained(bert_folder).eval()
    ids_BT = torch.randint(5, theirs.config.vocab_size, (2, 7))
    expected = theirs(ids_BT, output_hidden_states=True)
    bridge: Any = model.bridge
    _, text_BTH = bridge.qformer(None, bridge.embeddings(ids_BT), None, None)
    assert (text_BTH - expected.hidden_states[-1]).abs().max() < 1e-5
    logits = bridge.itg_head(text_BTH, bridge.embeddings.word_embeddings.weight)
    assert (logits[:, :, : theirs.config.vocab_size] - expected.logits).abs().max() < 1e-4
    assert logits.shape[2] == theirs.config.vocab_size + 1, "a row for [DEC]"
    assert model.text_tokenizer.bos_token == DECODER_TOKEN


def test_the_query_ffn_is_a_copy_and_the_rest_stays_as_drawn(model_config: ModelConfig, bert_folder: Path) -> None:
    fresh, started = (made(model_config, bert_folder) for _ in range(2))
    start_from_bert(started, str(bert_folder))
    layer: Any = started.bridge.qformer.encoder.layers()[1]
    assert torch.equal(layer.intermediate_query.dense.weight, layer.intermediate.dense.weight)
    assert torch.equal(layer.output_query.LayerNorm.bias, layer.output.LayerNorm.bias)
    before, after = fresh.bridge.state_dict(), started.bridge.state_dict()
    same = {key for key in before if torch.equal(before[key], after[key])}
    kept = ("query_tokens", "post_layernorm.", "vision_projection.", "text_projection.", "itm_head.", "temperature")
    kept += ("language_projection.",)
    assert same == {key for key in before if key.startswith(kept) or ".crossattention." in key}


def test_what_is_no_fitting_bert_is_refused(model_config: ModelConfig, bert_folder: Path) -> None:
    with pytest.raises(InputError, match=r"expected a BERT .* found clip_vision_model"):
        start_from_bert(made(model_config, bert_folder), model_config.vision)
    with pytest.raises(InputError, match=r"qformer\.ffn_width: expected 64, .* found 48"):
        start_from_bert(made(model_config, bert_folder, ffn_width=48), str(bert_folder))
    with pytest.raises(InputError, match=r"qformer\.layers: expected at most 3, .* found 4"):
        start_from_bert(made(model_config, bert_folder, layers=4), str(bert_folder))
    smaller = made(model_config, bert_folder)
    smaller.bridge.embeddings.word_embeddings = torch.nn.Embedding(9, 32)
    with pytest.raises(CheckpointError, match=r"the Q-Former 9: model\.text_tokenizer is not this BERT's"):
        start_from_bert(smaller, str(bert_folder))


def test_a_run_without_a_checkpoint_to_start_from_starts_from_bert(
    model_config: ModelConfig, bert_folder: Path, data: ResolvedData, tmp_path: Path
) -> None:
    config = model_config.model_copy(update={"text_tokenizer": str(bert_folder), "qformer_init": str(bert_folder)})
    out = run("stage1", config, data, tmp_path / "out", steps=1, learning_rate=1e-6, eval_items=2)
    words = load_file(out / "model.safetensors")["embeddings.word_embeddings.weight"]
    theirs = load_file(bert_folder / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    assert len(words) == len(theirs) + 1
    assert (words[: len(theirs)] - theirs).abs().max() < 1e-4, "one tiny step away"
    assert load_checkpoint(out).text_tokenizer.bos_token == DECODER_TOKEN
